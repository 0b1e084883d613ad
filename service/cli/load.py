"""`roster load`: a file of users or posts into the service."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import grpc
import orjson
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from roster.v1.bulk_pb2 import BulkAck, BulkOpened, BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.cli.environment import UsageError
from service.cli.ledger import Ledger, Rejects
from service.cli.rows import Columns, Csv, FileFormat, Ndjson, SourceError
from service.cli.source import STDIN, Source
from service.client import BATCH_ROWS, BulkLoader, LoadInterrupted, channel
from service.errors import TooManyFailures

INTERRUPTED = 130
REPORT_EVERY_SECONDS = 5
TOP_REASONS = 5
ON_CONFLICT = "What to do with a user whose e-mail is taken."
ATOMICITY = "What a failed row takes with it: itself, or its batch."
REJECTS_PATH = click.Path(dir_okay=False, path_type=Path)
FORMATS: dict[str, type[FileFormat]] = {"ndjson": Ndjson, "csv": Csv}
ENDINGS = {".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson", ".csv": "csv"}


@dataclass(frozen=True)
class Entity:
    """What can be loaded: the RPC that takes it, and the columns that are read."""

    method: Callable[[grpc.aio.Channel], Any]
    request: type[Message]
    message: type[Message]
    columns: tuple[str, ...]


ENTITIES = {
    "users": Entity(
        lambda connection: UserServiceStub(connection).BulkCreateUsers,
        BulkCreateUsersRequest,
        User,
        ("email", "full_name", "is_active", "hashed_password", "password"),
    ),
    "posts": Entity(
        lambda connection: PostServiceStub(connection).BulkCreatePosts,
        BulkCreatePostsRequest,
        Post,
        ("title", "content", "author_id", "author_email"),
    ),
}


class Load:
    """One load of one file, and what is told about it."""

    def __init__(self, entity: Entity, source: Source, options: BulkOptions, rejects: Rejects) -> None:
        self.entity = entity
        self.source = source
        self.options = options
        self.rejects = rejects
        self.ledger = Ledger(rejects)
        self.is_open = False
        self._started = time.monotonic()

    async def run(self, address: str, batch_rows: int) -> None:
        """Send the rows; raises what BulkLoader and Source do, and TooManyFailures."""
        async with channel(address) as connection:
            method = self.entity.method(connection)
            loader = BulkLoader(method, self.entity.request, self.options, batch_rows=batch_rows)
            rows = self._messages()
            with self._progress() as report:
                async with aclosing(rows), aclosing(loader.run(rows)) as events:
                    async for event in events:
                        self.is_open |= isinstance(event, BulkOpened)
                        if isinstance(event, BulkAck):
                            self.ledger.settle(event)
                            report()

    async def _messages(self) -> AsyncGenerator[Message, None]:
        async with aclosing(self.source.rows()) as rows:
            async for row in rows:
                self.ledger.note(row)
                if 0 < self.options.max_failures < self.ledger.failed:
                    raise TooManyFailures(f"more than {self.options.max_failures:,} rows failed")
                if row.message is not None:
                    yield row.message

    @contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        """Hand out what shows how far it is, on standard error: a bar on a terminal, otherwise some lines."""
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(self._told(), total=self.source.bytes_total or None)
                yield lambda: bar.update(task, description=self._told(), completed=self.source.bytes_read)
            return
        told_at = self._started

        def report() -> None:
            nonlocal told_at
            if time.monotonic() - told_at >= REPORT_EVERY_SECONDS:
                told_at = time.monotonic()
                click.echo(self._told(), err=True)

        yield report
        click.echo(self._told(), err=True)

    def _told(self) -> str:
        seconds, ledger = self._seconds(), self.ledger
        return f"{ledger.rows:,} rows, {ledger.rows / seconds:,.0f} rows/s, {ledger.failed:,} failed"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 0.001)

    def settled(self) -> str:
        """Return how many rows are in, for a load that did not get to its end."""
        ledger = self.ledger
        done = "were validated" if self.options.validate_only else "are in and durable"
        where = f" (see {self.rejects.path})" if self.rejects else ""
        return f"{ledger.rows - ledger.failed:,} rows {done}, {ledger.failed:,} failed{where}"

    def summary(self) -> str:
        """Return the end of the story for people."""
        rows, seconds = self.ledger.rows, self._seconds()
        counts = ", ".join(f"{count:,} {name}" for name, count in self.ledger.counts.items())
        lines = [
            f"{self.source.name}: {rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s): {counts}"
        ]
        for key, count in self.ledger.reasons.most_common(TOP_REASONS):
            lines.append(f"  {count:,} x {' '.join(filter(None, key))}, first: {self.ledger.sentences[key]}")
        if self.options.validate_only:
            lines.append("  only validated: nothing was written")
        if self.rejects:
            lines.append(f"  the failed rows are in {self.rejects.path}")
        return "\n".join(lines)

    def json(self) -> str:
        """Return the same for programs."""
        reasons: Counter[str] = Counter()
        for (reason, _), count in self.ledger.reasons.items():
            reasons[reason] += count
        told = {
            "file": self.source.name,
            "rows": self.ledger.rows,
            **self.ledger.counts,
            "seconds": round(self._seconds(), 3),
            "reasons": reasons,
            "rejects": str(self.rejects.path) if self.rejects else None,
        }
        return orjson.dumps(told).decode()


@click.command(context_settings={"show_default": True})
@click.argument("entity", type=click.Choice(list(ENTITIES)))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--address", envvar="ROSTER_ADDRESS", default="127.0.0.1:50051", help="host:port or unix:/path."
)
@click.option(
    "--on-conflict", type=click.Choice(["fail", "skip", "update"]), default="fail", help=ON_CONFLICT
)
@click.option("--update-mask", help="What --on-conflict update writes, such as full_name,is_active.")
@click.option("--batch-rows", type=click.IntRange(1), default=BATCH_ROWS, help="Rows a transaction, at most.")
@click.option("--atomicity", type=click.Choice(["row", "batch"]), default="row", help=ATOMICITY)
@click.option("--validate-only", is_flag=True, help="Run every check and write nothing.")
@click.option(
    "--max-failures", type=click.IntRange(0), default=0, help="Stop when more rows failed; 0: never."
)
@click.option(
    "--format", "format_name", type=click.Choice(list(FORMATS)), help="Default: by the file's name."
)
@click.option("--rejects", "rejects_path", type=REJECTS_PATH, help="Default: NAME.rejects.FORMAT, here.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as one JSON object.")
def load(
    entity: str,
    file: str,
    format_name: str | None,
    rejects_path: Path | None,
    address: str,
    batch_rows: int,
    is_json: bool,
    **options: Any,
) -> None:
    """Load a FILE of users or posts: NDJSON or CSV, plain or gzip; - is standard input.

    A row that fails does not stop the others. It goes to a file of rejects with the reason as `_error`;
    mend it there, and load that file.

    The status is 0 if all rows are in, 1 if some failed, 2 if the load could not run or came to no end.
    """
    kind = ENTITIES[entity]
    columns = Columns(kind.message, kind.columns)
    file_format = FORMATS[format_name or _format_name(file)](columns)
    rejects = Rejects(rejects_path or _rejects_path(file, file_format), file_format)
    _check_rejects_path(rejects.path, file)
    job = Load(kind, Source(file, file_format), _bulk_options(**options), rejects)
    try:
        asyncio.run(job.run(address, batch_rows))
    except KeyboardInterrupt:
        click.echo(f"interrupted: {job.settled()}", err=True)
        sys.exit(INTERRUPTED)
    except LoadInterrupted as error:
        raise UsageError(_explained(error, job, address)) from None
    except (SourceError, TooManyFailures, OSError) as error:
        raise UsageError(f"{job.source.name}: {error}; {job.settled()}") from None
    finally:
        rejects.close()
        if columns.ignored:
            click.echo(f"ignored columns: {', '.join(columns.ignored)}", err=True)
    click.echo(job.json() if is_json else job.summary())
    sys.exit(1 if job.ledger.failed else 0)


def _bulk_options(on_conflict: str, update_mask: str | None, atomicity: str, **others: Any) -> BulkOptions:
    if (on_conflict == "update") != bool(update_mask):
        raise click.UsageError("--update-mask is needed with --on-conflict update, and with nothing else")
    return BulkOptions(
        on_conflict=BulkOptions.OnConflict.Value(on_conflict.upper()),
        update_mask=FieldMask(paths=[path.strip() for path in update_mask.split(",")])
        if update_mask
        else None,
        atomicity=BulkOptions.Atomicity.Value(atomicity.upper()),
        **others,
    )


def _format_name(file: str) -> str:
    ending = Path(file.lower().removesuffix(".gz")).suffix
    if file != STDIN and ending not in ENDINGS:
        raise click.UsageError(f"the name {file} does not say what is in it; add --format ndjson or csv")
    return ENDINGS.get(ending, "ndjson")


def _rejects_path(file: str, file_format: FileFormat) -> Path:
    name = Path(file).name
    stem = "stdin" if file == STDIN else Path(name.removesuffix(".gz")).stem
    return Path(f"{stem}.rejects.{file_format.suffix}")


def _check_rejects_path(rejects: Path, file: str) -> None:
    if rejects.exists() and file != STDIN and rejects.samefile(file):
        raise click.UsageError(f"{rejects} is the file to load; name another one with --rejects")
    if not rejects.parent.is_dir():
        raise click.UsageError(f"there is no folder {rejects.parent} for the rejects")


def _explained(error: LoadInterrupted, job: Load, address: str) -> str:
    if job.is_open:
        return f"{job.source.name}: the load stopped: {error.message}; {job.settled()}"
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return f"no server answers at {address}; start one with `roster serve`, or name it with --address"
    return f"the server refused the load: {error.message}"
