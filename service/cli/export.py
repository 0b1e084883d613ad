"""`roster export`: export users or posts to a file."""

import asyncio
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, contextmanager, nullcontext
from enum import Enum, auto
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import click
import grpc
from google.protobuf.descriptor import FieldDescriptor

from roster.client import Backoff, Consistency
from roster.consistency import PRIMARY
from roster.errors import RosterError
from service.cli.compression import compress
from service.cli.formats import format_name
from service.cli.formats.write import csv_line, csv_lines, json_lines, pyarrow, time_texts
from service.cli.progress import show_progress
from service.cli.rows import ENTITIES, Entity, columns_of
from service.cli.terminal import (
    Integer,
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
from service.files import replace_when_complete
from service.memory import collect_rarely

STDOUT = "-"
GROUP_ROWS, GROUP_BYTES = 100_000, 64 << 20  # of a Parquet row group


class Place(Enum):
    """Where the rows go. A bar would mix with them on a terminal, to which a pipe may lead too."""

    FILE = auto()
    PIPE = auto()
    TERMINAL = auto()


class Output(Protocol):
    """A binary file, or standard output."""

    def write(self, data: bytes, /) -> int | None: ...


# Some rows: their values by column, times as microseconds since 1970.
Columns = Mapping[str, Sequence[Any]]
Write = Callable[[Columns], None]


@contextmanager
def _ndjson(file: Output, entity: Entity) -> Iterator[Write]:
    def write(columns: Columns) -> None:
        file.write(json_lines(_with_texts(columns, entity.times)))

    yield write


@contextmanager
def _csv(file: Output, entity: Entity) -> Iterator[Write]:
    def write(columns: Columns) -> None:
        file.write(csv_lines(_with_texts(columns, entity.times)))

    file.write(csv_line(entity.exported))
    yield write


def _with_texts(columns: Columns, times: Sequence[str]) -> Columns:
    """Return columns with their times as texts."""
    texts = time_texts([columns[name] for name in times])
    return {**columns, **dict(zip(times, texts, strict=True))}


@contextmanager
def _parquet(file: Output, entity: Entity) -> Iterator[Write]:
    """Write times as UTC microseconds, and rows in groups large enough to compress well."""
    arrow = pyarrow()
    types = {
        FieldDescriptor.TYPE_INT64: arrow.int64(),
        FieldDescriptor.TYPE_STRING: arrow.string(),
        FieldDescriptor.TYPE_BOOL: arrow.bool_(),
        FieldDescriptor.TYPE_MESSAGE: arrow.timestamp("us", "UTC"),
    }
    fields = entity.message.DESCRIPTOR.fields_by_name
    schema = arrow.schema([(name, types[fields[name].type]) for name in entity.exported])
    group: list[Any] = []

    def write(columns: Columns) -> None:
        arrays = [arrow.array(columns[field.name], field.type) for field in schema]
        group.append(arrow.RecordBatch.from_arrays(arrays, schema=schema))
        is_long = sum(map(len, group)) >= GROUP_ROWS
        is_large = sum(batch.nbytes for batch in group) >= GROUP_BYTES
        if is_long or is_large:
            writer.write_table(arrow.Table.from_batches(group))
            group.clear()

    with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        yield write
        if group:
            writer.write_table(arrow.Table.from_batches(group))


WRITERS = {"ndjson": _ndjson, "csv": _csv, "parquet": _parquet}


class EscapedOutput(io.RawIOBase):
    """Standard output on a terminal: lines are escaped, as by `echo`."""

    def write(self, text: Any) -> int:
        lines = map(escape, bytes(text).decode(errors="backslashreplace").split("\n"))
        sys.stdout.buffer.write("\n".join(lines).encode())
        return len(text)


class Export:
    """One export and its progress."""

    def __init__(
        self,
        entity: Entity,
        filter_: str | None,
        after_id: int = 0,
        *,
        consistency: str = PRIMARY,
        place: Place = Place.FILE,
        token_file: WatchTokenFile | None = None,
    ) -> None:
        self.entity = entity
        self.last_id = after_id
        self.rows = 0
        self._filter = filter_
        self._first_id = after_id
        self._consistency = consistency
        self._place = place
        self._token_file = token_file  # until it has the token
        self._backoff = Backoff()
        self._started = time.monotonic()

    async def run(self, target: Target, write: Write) -> None:
        """Write all rows, and resume after the last one if a stream breaks; raises RosterError, OSError."""
        async with target.channel(Consistency(self._consistency)) as connection:
            largest_id = await self._largest_id(connection)
            async with self._show_progress(largest_id - self._first_id):
                await self.copy(connection, write)

    async def copy(self, connection: grpc.aio.Channel, write: Write) -> None:
        """Do the same over a channel, without progress."""
        self._backoff.watch(connection)
        while True:
            try:
                await self._stream(connection, write)
            except RosterError as error:
                await self._backoff.wait(error)
            else:
                return

    def _show_progress(self, total: int) -> AbstractAsyncContextManager[None]:
        if self._place is Place.TERMINAL:
            return nullcontext()  # the rows are the progress
        return show_progress(total, self._state, draws=self._place is Place.FILE)

    async def _largest_id(self, connection: grpc.aio.Channel) -> int:
        lists, request = self.entity.rpc(connection, "List")
        page = await self._backoff.call(lists, request(order_by="id desc", page_size=1))
        return max((row.id for row in getattr(page, self.entity.name)), default=0)

    async def _stream(self, connection: grpc.aio.Channel, write: Write) -> None:
        exports, request = self.entity.rpc(connection, "Export")
        async for response in exports(request(filter=self._filter, after_id=self.last_id)):
            self._store_token(response.watch_token)
            messages = [*getattr(response, self.entity.name)]
            if not messages:  # there are no rows
                continue
            write(columns_of(messages, self.entity.exported))
            self.rows += len(messages)
            self.last_id = response.last_id
            self._backoff.reset()

    def _store_token(self, token: str) -> None:
        """Store the token of the first message. Those of streams that resume the export are too new."""
        if not self._token_file:
            return
        if not token:
            raise UsageError(
                f"the server sent no token for {OPTION}: its database can't serve the change feed, or a "
                "replica that is too far behind has answered; export without that option or --consistency"
            )
        self._token_file.store(token)
        self._token_file.close()
        self._token_file = None

    def _state(self) -> tuple[int, str]:
        return self.last_id - self._first_id, self.progress()

    def position(self) -> str:
        """Return the position from which an interrupted export can be resumed."""
        return f" after id {self.last_id}: {self.progress()}"

    def progress(self) -> str:
        """Return the text of the progress bar."""
        rate = self.rows / max(time.monotonic() - self._started, 0.001)
        return f"{pluralize(self.rows, self.entity.name[:-1])}, {rate:,.0f} rows/s"


@click.command(context_settings={"show_default": True})
@click.argument("entity", type=click.Choice(list(ENTITIES)))
@server_options
@click.option(
    "--output",
    "-o",
    default=STDOUT,
    help="Output file, compressed if its name ends in .gz or .zst; - is standard output.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(WRITERS)),
    help="Format of the file.  [default: from the file name, otherwise ndjson]",
)
@click.option("--filter", "filter_", help="Export only matching rows, such as 'is_active = true'.")
@click.option(
    "--after-id", type=Integer(0), default=0, help="Export only rows with greater ids, as to resume."
)
@click.option(
    "--consistency",
    default=PRIMARY,
    help="Read on replicas: any, or the token of a write, to read on those that have it.",
)
@click.option(
    OPTION,
    "watch_token_file",
    type=PATH,
    help="Store in this file where `roster changes` continues. For users and posts, only the first export "
    "needs it: a later token would skip changes.",
)
def export(
    entity: str,
    target: Target,
    output: str,
    format_: str | None,
    filter_: str | None,
    after_id: int,
    consistency: str,
    watch_token_file: Path | None,
) -> None:
    """Export users or posts, ordered by id. `roster load --restore` loads them again.

    The output file gets its name when it is complete; until then it ends in .part. Times are in UTC, with
    microseconds. An unset field is null in NDJSON and Parquet; in CSV it is an empty cell, and an empty
    string is "".

    The exit status is 0 if all rows were exported, otherwise 2. If Ctrl-C or SIGTERM ended the export, it is
    130 or 143. The error says after which id to resume.
    """
    token_file = _token_file(watch_token_file, after_id)
    job = Export(
        ENTITIES[entity],
        filter_,
        after_id,
        consistency=consistency,
        place=_place(output),
        token_file=token_file,
    )
    kind = WRITERS[format_ or format_name(output)]
    if kind is _parquet:
        pyarrow()  # if it is missing, fail before the file is created
    collect_rarely()
    try:
        with exit_on_signal(job.position), _open_output(output) as file, kind(file, job.entity) as write:
            asyncio.run(job.run(target, write))
    except BrokenPipeError:  # the reader has closed the pipe
        raise
    except (RosterError, OSError) as error:
        message = target.explain(error) if isinstance(error, RosterError) else _describe(output, error)
        hint = f"; resume with --after-id {job.last_id}" if job.rows else ""
        raise UsageError(f"{message}{hint}") from None
    echo(job.progress(), err=True)


def _token_file(path: Path | None, after_id: int) -> WatchTokenFile | None:
    """Return the file for the token of an export; None if one that is resumed has it; raises UsageError."""
    if not path:
        return None
    file = WatchTokenFile(path)
    if not after_id:
        file.lock()
        return file
    with closing(file):
        has_token = bool(file.read())
    if not has_token:
        raise UsageError(
            f"{OPTION} {path} does not exist: an export that is resumed keeps the token of its beginning; "
            "export again without --after-id"
        )
    return None


def _describe(output: str, error: OSError) -> str:
    if not error.strerror:
        return str(error)
    return output_error(error).message if output == STDOUT else f"can't write {output}: {error.strerror}"


def _place(output: str) -> Place:
    if output != STDOUT or S_ISREG(os.fstat(sys.stdout.fileno()).st_mode):
        return Place.FILE
    return Place.TERMINAL if sys.stdout.isatty() else Place.PIPE


@contextmanager
def _open_output(output: str) -> Iterator[Output]:
    if output == STDOUT:
        yield EscapedOutput() if sys.stdout.isatty() else sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with replace_when_complete(Path(output)) as file:
        compressed = compress(file, output)
        yield compressed
        if compressed is not file:
            compressed.close()
