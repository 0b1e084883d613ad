"""`roster export`: all users or posts, or those that match a filter, into a file."""

import asyncio
import gzip
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
from google.protobuf.descriptor import FieldDescriptor

from service.cli.formats import csv_line, format_name, json_line, pyarrow
from service.cli.rows import ENTITIES, Entity, values_of
from service.cli.terminal import Target, UsageError, counted, echo, progress, server_options, stoppable
from service.client import Patience
from service.errors import RosterError
from service.escape import escape
from service.files import replacing

STDOUT = "-"
GROUP_ROWS, GROUP_BYTES = 100_000, 64 << 20  # of a row group of Parquet


Write = Callable[[list[dict[str, Any]]], None]


@contextmanager
def _ndjson(file: Any, entity: Entity) -> Iterator[Write]:  # noqa: ARG001
    yield lambda rows: file.writelines(map(json_line, rows))


@contextmanager
def _csv(file: Any, entity: Entity) -> Iterator[Write]:
    file.write(csv_line(entity.exported))
    yield lambda rows: file.writelines(csv_line(row.values()) for row in rows)


@contextmanager
def _parquet(file: Any, entity: Entity) -> Iterator[Write]:
    """Write times as microseconds of UTC, and rows when they are worth a row group."""
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

    def write(rows: list[dict[str, Any]]) -> None:
        group.append(arrow.RecordBatch.from_pylist(rows, schema))
        if sum(map(len, group)) >= GROUP_ROWS or sum(batch.nbytes for batch in group) >= GROUP_BYTES:
            writer.write_table(arrow.Table.from_batches(group))
            group.clear()

    with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        yield write
        if group:
            writer.write_table(arrow.Table.from_batches(group))


WRITERS = {"ndjson": _ndjson, "csv": _csv, "parquet": _parquet}


class Terminal(io.RawIOBase):
    """Standard output where people read it: lines are escaped, as `echo` does."""

    def write(self, text: Any) -> int:
        lines = map(escape, bytes(text).decode(errors="backslashreplace").split("\n"))
        sys.stdout.buffer.write("\n".join(lines).encode())
        return len(text)


class Export:
    """One export, and how far it is."""

    def __init__(self, entity: Entity, filter_: str | None, after_id: int) -> None:
        self.entity = entity
        self.last_id = after_id
        self.rows = 0
        self._filter = filter_
        self._first_id = after_id
        self._patience = Patience()
        self._started = time.monotonic()

    async def run(self, target: Target, write: Write) -> None:
        """Write all rows, and go on behind the last one after a break; raises RosterError, OSError."""
        async with target.channel() as connection:
            largest_id = await self._largest_id(connection)
            async with progress(largest_id - self._first_id, self._state):
                while True:
                    try:
                        await self._stream(connection, write)
                    except RosterError as error:
                        await self._patience.endure(error)
                    else:
                        return

    async def _largest_id(self, connection: grpc.aio.Channel) -> int:
        lists, request = self.entity.rpc(connection, "List")
        page = await self._patience.call(lists, request(order_by="id desc", page_size=1))
        return max((row.id for row in getattr(page, self.entity.name)), default=0)

    async def _stream(self, connection: grpc.aio.Channel, write: Write) -> None:
        exports, request = self.entity.rpc(connection, "Export")
        async for answer in exports(request(filter=self._filter, after_id=self.last_id)):
            messages = getattr(answer, self.entity.name)
            write([values_of(message, self.entity.exported) for message in messages])
            self.rows += len(messages)
            self.last_id = answer.last_id
            self._patience.renew()

    def _state(self) -> tuple[int, str]:
        return self.last_id - self._first_id, self.told()

    def stopped(self) -> str:
        """Return how far it came."""
        return f" behind id {self.last_id}: {self.told()}"

    def told(self) -> str:
        """Return how far it is."""
        rate = self.rows / max(time.monotonic() - self._started, 0.001)
        return f"{counted(self.rows, self.entity.name[:-1])}, {rate:,.0f} rows/s"


@click.command(short_help="Export users or posts into a file.", context_settings={"show_default": True})
@click.argument("entity", type=click.Choice(list(ENTITIES)))
@server_options
@click.option("--output", "-o", default=STDOUT, help="A file, gzip if its name ends in .gz; - is stdout.")
@click.option("--format", "format_", type=click.Choice(list(WRITERS)), help="Default: by the file's name.")
@click.option("--filter", "filter_", help="Which rows, such as 'is_active = true'.")
@click.option("--after-id", type=click.IntRange(0), default=0, help="Only rows with greater ids.")
def export(
    entity: str, target: Target, output: str, format_: str | None, filter_: str | None, after_id: int
) -> None:
    """Export users or posts, in the order of their ids; `roster load --restore` takes them back.

    The file has its name only when it is complete; before, `.part` is added. Times are in UTC, with
    microseconds. What is not set is null in NDJSON and Parquet; in CSV it is nothing, an empty text "".
    """
    job = Export(ENTITIES[entity], filter_, after_id)
    kind = WRITERS[format_ or format_name(output)]
    if kind is _parquet:
        pyarrow()  # where it is missing no file is begun
    try:
        with stoppable(job.stopped), _file(output) as file, kind(file, job.entity) as write:
            asyncio.run(job.run(target, write))
    except BrokenPipeError:  # whoever reads has enough
        raise
    except (RosterError, OSError) as error:
        told = target.explained(error) if isinstance(error, RosterError) else str(error)
        hint = f"; go on with --after-id {job.last_id}" if job.rows else ""
        raise UsageError(f"{told}{hint}") from None
    echo(job.told(), err=True)


@contextmanager
def _file(output: str) -> Iterator[Any]:
    if output == STDOUT:
        yield Terminal() if sys.stdout.isatty() else sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with replacing(Path(output)) as file:
        if not output.endswith(".gz"):
            yield file
            return
        with gzip.open(file, "wb", compresslevel=6) as compressed:
            yield compressed
