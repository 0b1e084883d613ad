"""`roster load`: a file of users or posts into the service, going on where an earlier run of it stopped."""

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from service.cli.formats import FORMATS, STDIN, SourceError, format_name
from service.cli.ledger import Ledger
from service.cli.rows import ENTITIES, Columns, Entity
from service.cli.source import Source
from service.cli.terminal import (
    PAGE_SIZE,
    Target,
    UsageError,
    counted,
    echo,
    progress,
    server_options,
    stoppable,
)
from service.client import BATCH_ROWS, BulkLoader, LoadInterrupted, Patience, pages
from service.client.errors import may_pass
from service.errors import LoadAborted, LoadExpired, RosterError, TooManyFailures

TOP_REASONS = 5
LOAD_ID = (
    "Name of the load; the same one goes on with it.  [default: by what is in the file, and the options]"
)
ON_CONFLICT = "What to do with a row whose key is taken."
UPDATE_MASK = "What --update and --on-conflict update write, such as full_name,is_active."
ATOMICITY = "What a failed row takes with it: itself, or its batch."
RESTORE = "Create rows with the id, created_at, updated_at and version that the file has, as exported."
PATH = click.Path(dir_okay=False, path_type=Path)
OPTION = re.compile(r"\b(?:options\.(\w+)|(load_id))\b")


class Load:
    """One load of one file, and what is told about it."""

    def __init__(self, entity: Entity, source: Source, options: pb.BulkOptions, ledger: Ledger) -> None:
        self.entity = entity
        self.source = source
        self.options = options
        self.ledger = ledger
        self.summary = pb.BulkSummary()
        self.is_open = self.was_finished = False
        self._skipped = 0  # rows that an earlier run has sent, and that are not sent again
        self._patience = Patience()
        self._started = time.monotonic()

    async def run(self, target: Target, verb: str, batch_rows: int) -> None:
        """Send the rows; raises what BulkLoader and Source do, and TooManyFailures."""
        await self.source.look_ahead()  # a load that can't be read is not opened
        async with target.channel() as connection, progress(self.source.bytes_total, self._state):
            method, request = self.entity.rpc(connection, verb)
            loader = BulkLoader(method, request, self.options, batch_rows=batch_rows, is_known=False)
            loads = BulkServiceStub(connection)
            rows = self._messages(loads)
            try:
                async with aclosing(rows), aclosing(loader.run(rows)) as events:
                    async for event in events:
                        if isinstance(event, pb.BulkSummary):
                            self.summary = event
                        elif isinstance(event, pb.BulkAck):
                            self.ledger.settle(event)
                        elif not self.is_open:
                            await self._opened(event, loads)
            except LoadInterrupted as failure:
                if not self.is_open and isinstance(failure.cause, LoadAborted | LoadExpired):
                    found = await self._found(loads)
                    self.is_open, self.ledger.rows, self.ledger.failed = True, found.next_offset, found.failed
                raise

    async def _opened(self, opened: pb.BulkOpened, loads: BulkServiceStub) -> None:
        self.is_open = True
        self._patience.renew()
        if not opened.next_offset:
            return
        found = await self._found(loads)
        self.was_finished = found.state == pb.BulkLoad.FINISHED
        if not self.was_finished:
            echo(f"going on at row {opened.next_offset + 1:,}", err=True)
        if not self.options.return_ids:
            self._skipped = self.ledger.rows = opened.next_offset
            self.ledger.failed = found.failed

    async def _found(self, loads: BulkServiceStub) -> pb.BulkLoad:
        request = pb.GetBulkLoadRequest(load_id=self.options.load_id)
        found: pb.BulkLoad = await self._patience.call(loads.GetBulkLoad, request)
        return found

    async def _messages(self, loads: BulkServiceStub) -> AsyncGenerator[Message, None]:
        """Yield the rows that can be read; the loader leaves out those that are skipped."""
        request = pb.ListBulkLoadFailuresRequest(load_id=self.options.load_id, page_size=PAGE_SIZE)
        failures = pages(partial(self._patience.call, loads.ListBulkLoadFailures), request)
        async with aclosing(failures), aclosing(self.source.rows()) as rows:
            failure = await anext(failures, None) if self._skipped else None
            offset = 0
            async for row in rows:
                if row.message is None or offset >= self._skipped:
                    self.ledger.note(row)
                elif failure and failure.offset == offset:
                    self.ledger.reject(row, failure)
                    failure = await anext(failures, None)
                if 0 < self.options.max_failures < self.ledger.failed:
                    raise TooManyFailures(f"more than {self.options.max_failures:,} rows failed")
                if row.message is not None:
                    offset += 1
                    yield row.message

    def _state(self) -> tuple[int, str]:
        rows, failed = self.ledger.rows, self.ledger.failed
        return self.source.bytes_read, f"{rows:,} rows, {self._rate():,.0f} rows/s, {failed:,} failed"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 0.001)

    def _rate(self) -> float:
        return (self.ledger.rows - self._skipped) / self._seconds()

    def settled(self, *, may_go_on: bool) -> str:
        """Return how many rows are in, for a load that did not get to its end."""
        ledger = self.ledger
        rows = ledger.rows - ledger.failed
        done = "validated" if self.options.validate_only else "in and durable"
        where = f" (see {ledger.rejects})" if ledger.rejects else ""
        again = "; the same command goes on from there" if may_go_on and self.options.load_id else ""
        verb = "is" if rows == 1 else "are"
        return f"{counted(rows, 'row')} {verb} {done}, {ledger.failed:,} failed{where}{again}"

    def told(self) -> dict[str, Any]:
        """Return the summary for programs."""
        return {
            "file": self.source.name,
            "load_id": self.options.load_id or None,
            "was_finished": self.was_finished,
            "rows": self.ledger.rows,
            **{name: getattr(self.summary, name) for name in ("created", "updated", "skipped")},
            "failed": self.ledger.failed,
            "seconds": round(self._seconds(), 3),
            "reasons": self.ledger.reasons,
            "rejects": self.ledger.rejects,
        }

    def lines(self) -> list[str]:
        """Return the summary for people, line by line."""
        told = self.told()
        counts = ", ".join(f"{told[name]:,} {name}" for name in ("created", "updated", "skipped", "failed"))
        now = f", {told['rows'] - self._skipped:,} of them now," if self._skipped else ""
        took = f"{counted(told['rows'], 'row')}{now} in {self._seconds():.1f} s ({self._rate():,.0f} rows/s)"
        if self.was_finished:
            took = "finished before; nothing was sent (another --load-id loads it again)"
        lines = [f"{told['file']}: {took}: {counts}"]
        for reason, count in self.ledger.reasons.most_common(TOP_REASONS):
            lines.append(f"  {count:,} x {reason}, first in {self.ledger.sentences[reason]}")
        if unread := self.ledger.unread:
            lines.append(f"  {counted(unread, 'row')} could not be read; `roster loads` does not count them")
        if self.options.validate_only:
            lines.append("  only validated: nothing was written")
        if told["rejects"]:
            kept = str(self.ledger.path)
            hint = f"; {kept} is another's, or mended, and stays" if told["rejects"] != kept else ""
            lines.append(f"  the failed rows are in {told['rejects']}{hint}")
        return lines


def _choice(enum: Any) -> click.Choice[str]:
    return click.Choice(enum.keys(), case_sensitive=False)


@click.command(short_help="Load a file of users or posts.", context_settings={"show_default": True})
@click.argument("entity", type=click.Choice(list(ENTITIES)))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@server_options
@click.option("--load-id", help=LOAD_ID)
@click.option("--update", "operation", flag_value="update", help="Update rows, by id.")
@click.option("--restore", "operation", flag_value="restore", help=RESTORE)
@click.option("--update-mask", help=UPDATE_MASK)
@click.option("--on-conflict", type=_choice(pb.BulkOptions.OnConflict), default="fail", help=ON_CONFLICT)
@click.option("--batch-rows", type=click.IntRange(1), default=BATCH_ROWS, help="Rows a transaction, at most.")
@click.option("--atomicity", type=_choice(pb.BulkOptions.Atomicity), default="row", help=ATOMICITY)
@click.option("--validate-only", is_flag=True, help="Run every check and write nothing.")
@click.option("--max-failures", type=click.IntRange(0), default=0, help="Stop when more failed; 0: never.")
@click.option(
    "--format", "file_format", type=click.Choice(list(FORMATS)), help="Default: by the file's name."
)
@click.option("--rejects", type=PATH, help="Default: NAME.rejects.FORMAT, beside the file.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as one JSON object.")
def load(
    entity: str,
    file: str,
    target: Target,
    operation: str | None,
    update_mask: str | None,
    batch_rows: int,
    file_format: str | None,
    rejects: Path | None,
    *,
    is_json: bool,
    **options: Any,
) -> None:
    """Load a FILE of users or posts: NDJSON, CSV or Parquet, plain or gzip; - is standard input.

    A row that fails does not stop the others. It goes to a file of rejects with the reason as `_error`;
    mend it there, and load that file. A file of rejects that is there already is not overwritten.

    A load that was stopped goes on when the same command is typed again. With standard input it needs a
    --load-id for that, and the same rows.

    The status is 0 if all rows are in, 1 if some failed, 2 if the load could not run or came to no end.
    """
    kind, operation = ENTITIES[entity], operation or "create"
    masked = update_mask.replace(" ", "").split(",") if update_mask else []
    if not masked and (operation == "update" or options["on_conflict"] == "UPDATE"):
        option = "--update" if operation == "update" else "--on-conflict update"
        raise click.UsageError(f"{option} needs --update-mask")
    columns = Columns(kind.message, kind.columns(operation, masked))
    source = Source(file, FORMATS[file_format or format_name(file)](columns))
    ledger = Ledger(_rejects_path(rejects, file, source.format.suffix), source.format)
    chosen = pb.BulkOptions(
        restore=operation == "restore",
        update_mask=FieldMask(paths=masked),
        # Of a batch that failed as a whole only they tell, when it is sent again, which rows it had.
        return_ids=options["atomicity"] == "BATCH",
        **options,
    )
    if chosen.validate_only:
        chosen.load_id = ""  # nothing is kept that could be gone on with
    elif not chosen.load_id:
        chosen.load_id = _load_id(source, f"{entity}-{operation}", chosen)
    job = Load(kind, source, chosen, ledger)
    try:
        with stoppable(lambda: f": {job.settled(may_go_on=True)}"), closing(ledger):
            asyncio.run(job.run(target, "BulkUpdate" if operation == "update" else "BulkCreate", batch_rows))
    except (SourceError, TooManyFailures, OSError) as error:
        raise UsageError(f"{source.name}: {error}; {job.settled(may_go_on=False)}") from None
    except RosterError as failure:
        cause = failure.cause if isinstance(failure, LoadInterrupted) else failure
        if not job.is_open:
            raise UsageError(f"nothing was loaded: {_typed(target.explained(cause))}") from None
        settled = job.settled(may_go_on=may_pass(cause))
        raise UsageError(f"{source.name}: the load stopped: {_typed(failure.message)}; {settled}") from None
    finally:
        if columns.ignored:
            echo(f"ignored columns: {', '.join(columns.ignored)}", err=True)
    echo(*([json.dumps(job.told())] if is_json else job.lines()))
    sys.exit(1 if ledger.failed else 0)


def _typed(message: str) -> str:
    return OPTION.sub(lambda found: f"--{found[1] or found[2]}".replace("_", "-"), message)


def _load_id(source: Source, kind: str, options: pb.BulkOptions) -> str:
    """Return a name that stays the same as long as the same would be written."""
    effect = pb.BulkOptions()
    effect.CopyFrom(options)
    effect.ClearField("max_failures")
    content, form = source.digest(), type(source.format).__name__
    parts = (content, form.encode(), effect.SerializeToString(deterministic=True))
    return f"{kind}-{sha256(b'/'.join(parts)).hexdigest()[:32]}" if content else ""


def _rejects_path(rejects: Path | None, file: str, suffix: str) -> Path:
    whole = Path("stdin" if file == STDIN else file.removesuffix(".gz"))
    path = rejects or whole.with_name(f"{whole.stem}.rejects.{suffix}")
    if path.exists() and file != STDIN and path.samefile(file):
        raise click.UsageError(f"{path} is the file to load; name another one with --rejects")
    if not os.access(path.parent, os.W_OK):
        raise click.UsageError(f"there is no folder {path.parent} to write to; name a file with --rejects")
    return path
