"""`roster changes`: print the changes of users and posts as they happen."""

import asyncio
import errno
import os
import select
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing, closing, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from stat import S_ISFIFO, S_ISREG, S_ISSOCK
from typing import Any

import click
import orjson

from roster.client import FeedReset, TokenExpired, watch_changes
from roster.errors import InvalidField, PermissionDenied, RosterError
from roster.v1.changes_pb2 import Change
from service.cli.formats.write import time_texts
from service.cli.rows import ENTITIES, Entity, columns_of
from service.cli.terminal import (
    Target,
    UsageError,
    echo,
    exit_on_signal,
    output_error,
    pluralize,
    server_options,
)
from service.cli.watch_token import OPTION, PATH, WatchTokenFile
from service.escape import escape

DEFAULT = "watch"
BEARER = "--bearer-token-file"  # which other commands call --token-file
# An entity of files may be missing in the feed.
NAMES = [name for name in ENTITIES if name.upper() in Change.Entity.DESCRIPTOR.values_by_name]
ROWS = {name.removesuffix("s"): ENTITIES[name] for name in NAMES}


class ChangesGroup(click.Group):
    """A group whose default command is `watch`, so that its options can follow the name of the group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in self.commands and first not in self.get_help_option_names(ctx):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands[DEFAULT].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=ChangesGroup, options_metavar="[OPTIONS]", subcommand_metavar="[watch | reset]")
def changes() -> None:
    """Print changes of users and posts as they happen, or begin a new feed.

    Without a command, `roster changes` is `roster changes watch`. Each change is a line of JSON with
    `changed_at` and one of `user`, `post`, `deleted_user_id`, `deleted_post_id`. Rows are as `roster export`
    writes them. The next line about a row replaces the last one.

    To begin with a copy, export all rows with --watch-token-file, then run this with the same file: it
    continues where the export began. docs/changes.md explains the feed.

    Ctrl-C and SIGTERM end the command. The exit status is then 130 or 143, otherwise 2.
    """


@changes.command(context_settings={"show_default": True}, short_help="Print changes; the default.")
@partial(server_options, token_file=BEARER)
@click.option(
    OPTION,
    "--token-file",
    "path",
    type=PATH,
    help="Continue at the token in this file, and store the last one there. If it does not exist, begin "
    "now.  [default: begin now]",
)
@click.option(
    "--entity",
    "names",
    type=click.Choice(NAMES),
    multiple=True,
    help="Only changes of these; repeat it for several.  [default: all]",
)
def watch(target: Target, path: Path | None, names: Sequence[str]) -> None:
    """Print changes of users and posts as they happen, one line of JSON for each.

    See `roster changes --help`.
    """
    entities = [Change.Entity.Value(name.upper()) for name in names or NAMES]
    token_file = WatchTokenFile(path) if path else None
    job = Watch(token_file)
    with exit_on_signal(job.progress), closing(token_file) if token_file else nullcontext():
        try:
            asyncio.run(job.run(target, entities))
        except (FeedReset, TokenExpired) as error:
            raise UsageError(target.explain(error), _begin_again(path)) from None
        except InvalidField as error:
            is_other = path and "damaged" in error.message  # a bearer token, perhaps
            lines = (
                [f"{OPTION} is for the token of the feed; {BEARER} is for a bearer token"] if is_other else []
            )
            raise UsageError(target.explain(error), *lines) from None
        except PermissionDenied as error:
            raise UsageError(target.explain(error), *_explain_rights(names)) from None
        except BrokenPipeError:  # the reader has closed the pipe
            raise
        except RosterError as error:
            raise UsageError(target.explain(error)) from None
        except OSError as error:
            raise output_error(error) from None


@changes.command(short_help="Begin a new feed, after a restore that can't be detected.")
def reset() -> None:
    """Begin a new feed in the database of ROSTER_DATABASE_URL, after a restore that can't be detected.

    Servers detect a restored dump, a recovery to a point in time, and a promoted standby. They can't detect
    reliably that files were replaced by older ones, such as a SQLite file from a backup or a snapshot of
    PostgreSQL's disk: run this before the servers start again. Run it also after writes for which the
    triggers of users or posts did not fire, such as those of `pg_restore --disable-triggers`.

    The command empties the log of changes. All tokens made so far are refused as FEED_RESET, and consumers
    make new copies. Users and posts are not changed. It is safe to run it while servers run.
    """
    from service.cli.reset import reset_database  # noqa: PLC0415  (clients don't import the server)

    reset_database()


class Watch:
    """One run of `roster changes`: it writes each response to standard output, then stores its token."""

    def __init__(self, token_file: WatchTokenFile | None) -> None:
        self._token_file = token_file
        self._lines = 0
        self._output = sys.stdout.fileno()
        self._mode = os.fstat(self._output).st_mode
        self._is_terminal = sys.stdout.isatty()
        self._is_reader_gone = False

    async def run(self, target: Target, entities: Sequence[Change.Entity.ValueType]) -> None:
        """Write changes until a signal ends it; raises RosterError, OSError, UsageError.

        If the reader of a pipe closes it, this ends at once, not when there is another change to write.
        """
        if S_ISFIFO(self._mode):
            # The other end of a pipe never becomes readable; the event is that it was closed.
            asyncio.get_running_loop().add_reader(self._output, self._end, asyncio.current_task())
        try:
            await self._follow(target, entities)
        except asyncio.CancelledError:
            if not self._is_reader_gone:
                raise
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None

    def _end(self, task: "asyncio.Task[Any] | None") -> None:
        self._is_reader_gone = True
        asyncio.get_running_loop().remove_reader(self._output)
        if task:
            task.cancel()

    async def _follow(self, target: Target, entities: Sequence[Change.Entity.ValueType]) -> None:
        token = self._token_file.read() if self._token_file else ""
        if self._token_file and not token:  # a misspelt name would lose changes
            echo(f"{self._token_file.path} does not exist: beginning now", err=True)
        async with (
            target.channel() as connection,
            aclosing(watch_changes(connection, token, entities)) as responses,
        ):
            async for response in responses:
                await self._write(response.changes)
                if self._token_file:
                    self._token_file.store(response.token)

    def progress(self) -> str:
        """Return what to add to `interrupted`."""
        return f" after {pluralize(self._lines, 'change')}"

    async def _write(self, found: Sequence[Change]) -> None:
        data = change_lines(found)
        if self._is_terminal:
            data = "\n".join(map(escape, data.decode().split("\n"))).encode()
        if self._is_terminal or S_ISFIFO(self._mode) or S_ISSOCK(self._mode):
            await _write_when_ready(self._output, data)
        else:
            _write_all(self._output, data)
        if S_ISREG(self._mode) and self._token_file:
            os.fsync(self._output)
        self._lines += len(found)


def change_lines(found: Sequence[Change]) -> bytes:
    """Return changes as lines of JSON, with rows as `roster export` writes them."""
    documents: list[Mapping[str, Any]] = []
    for name, group in groupby(found, lambda change: change.WhichOneof("change")):
        if name:  # all entities that this release asks for have one
            values = [getattr(change, name) for change in group]
            rows = _rows(values, ROWS[name]) if name in ROWS else values
            documents += [{name: row} for row in rows]
    [times] = time_texts(columns_of(found, ["changed_at"]).values())
    return b"".join(
        orjson.dumps({**document, "changed_at": time}, option=orjson.OPT_APPEND_NEWLINE)
        for document, time in zip(documents, times, strict=True)
    )


def _rows(messages: Sequence[Any], entity: Entity) -> Iterable[Mapping[str, Any]]:
    columns = columns_of(messages, entity.exported)
    texts = time_texts([columns[name] for name in entity.times])
    columns = {**columns, **dict(zip(entity.times, texts, strict=True))}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _write_all(output: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(output, rest) :]


async def _write_when_ready(output: int, data: bytes) -> None:
    """Write to a pipe or a terminal as its reader reads; meanwhile a signal can end the command.

    A write that blocked would not notice the signal if another thread received it. There is no buffer: the
    end of the process would wait for a reader of what is in it.
    """
    loop, ready, rest = asyncio.get_running_loop(), asyncio.Event(), memoryview(data)
    while rest:
        ready.clear()
        loop.add_writer(output, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(output)
        # A pipe that is ready has room for as much.
        rest = rest[os.write(output, rest[: select.PIPE_BUF]) :]


def _explain_rights(names: Sequence[str]) -> Sequence[str]:
    if names:
        return []
    return [f"a watch of all entities needs the right to get each of {', '.join(NAMES)}; --entity names some"]


def _begin_again(path: Path | None) -> str:
    name = path or "FILE"
    return (
        f"run `roster export users {OPTION} {name} --output users.ndjson`, which stores that token, and "
        "`roster export posts --output posts.ndjson`; replace the copy by these rows, then run this again"
    )
