"""`roster load`: load a file of users or posts, or resume where an earlier run stopped."""

import asyncio
import codecs
import json
import os
import re
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from roster.client import BATCH_ROWS, Backoff, BulkLoader, LoadInterrupted, pages
from roster.client.errors import is_retryable
from roster.errors import (
    FailedPrecondition,
    LoadAborted,
    LoadExpired,
    LoadNotFound,
    RosterError,
    TooManyFailures,
    Unauthenticated,
)
from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from service.cli.columns import Columns, parse_columns
from service.cli.compression import without_compression
from service.cli.formats import (
    FORMATS,
    LOADED_ENDINGS,
    STDIN,
    Csv,
    FileFormat,
    Json,
    SourceError,
    format_name,
)
from service.cli.formats.csv_file import DELIMITERS
from service.cli.mirror.options import DeleteLimit, DeleteLimitType, MirrorOptions, check_filter
from service.cli.operations import FLAGS, operation_of
from service.cli.progress import show_progress
from service.cli.rejects import RejectsFile
from service.cli.report import LoadReport
from service.cli.rows import ENTITIES, Entity
from service.cli.source import Source
from service.cli.terminal import (
    PAGE_SIZE,
    Integer,
    Target,
    UsageError,
    echo,
    exit_on_signal,
    pluralize,
    server_options,
)
from service.cli.tracker import RowTracker
from service.cli.undo import undo_name
from service.memory import collect_rarely

LOAD_ID = "Load ID; reuse it to resume a load.  [default: derived from the file and the options]"
CALLER = "For admins: resume the load that this caller started.  [default: a load of your own]"
ON_CONFLICT = "What to do with a row whose key already exists."
UPDATE_MASK = "Columns that --update and --on-conflict update write, such as full_name,is_active."
ATOMICITY = "Whether a failed row fails only itself or its whole batch."
RESTORE = "Create rows with the id, created_at, updated_at and version of an export."
DELETE = "Delete the rows whose keys are in the file: users by id or email, posts by id."
ON_MISSING = {"fail": pb.BulkOptions.FAIL_MISSING, "skip": pb.BulkOptions.SKIP_MISSING}
MISSING = "What --delete does with a row that does not exist."
MIRROR = "Make the users equal to the file: create, update and delete those that differ."
FILTER = (
    "The users that --mirror makes equal to the file, such as 'email = \"*@example.org\"'.  [default: all]"
)
MAX_DELETES = "Refuse to --mirror a file that lacks more of the users that match."
FORMAT = "Format of the file.  [default: from the file name]"
COLUMNS = 'Columns with other names, such as email=Mail,full_name="Full Name".'
IGNORE = "Column that is not read, although its name is near that of a known one; repeat it for several."
DELIMITER = "Delimiter of CSV.  [default: found from the header line]"
ENCODING = "Encoding of CSV, such as cp1252.  [default: UTF-8, or UTF-16 by its byte order mark]"
NULL = "Unquoted cell of CSV that means unset, such as NULL or NA; repeat it for several."
REJECTS = "File for the rows that fail.  [default: NAME.rejects.FORMAT, next to FILE]"
PATH = click.Path(dir_okay=False, path_type=Path)
VERBS = {"update": "BulkUpdate", "delete": "BulkDelete"}
OPTION = re.compile(r"\b(?:options\.(\w+)|(load_id))\b")


class Load:
    """One run of a load."""

    def __init__(
        self,
        entity: Entity,
        source: Source,
        options: pb.BulkOptions,
        report: LoadReport,
        rejects: RejectsFile,
        earlier_id: str,
    ) -> None:
        self.is_open = False
        self._earlier_id = earlier_id
        self._entity = entity
        self._source = source
        self._options = options
        self._report = report
        self._tracker = RowTracker(report, rejects)
        self._backoff = Backoff()

    async def run(self, target: Target, verb: str, batch_rows: int) -> None:
        """Send the rows; raises the errors of BulkLoader and Source, and TooManyFailures."""
        await self._source.prefetch()  # a file that can't be read must not open a load
        async with target.channel() as connection, show_progress(self._source.bytes_total, self._progress):
            method, request = self._entity.rpc(connection, verb)
            self._backoff.watch(connection)
            loader = BulkLoader(
                *(method, request, self._options),
                batch_rows=batch_rows,
                retry_connect=False,
                connection=connection,
            )
            loads = BulkServiceStub(connection)
            await self._refuse_earlier_load(loads)
            try:
                async with aclosing(loader.run(partial(self._messages, loads))) as events:
                    async for event in events:
                        if isinstance(event, pb.BulkSummary):
                            self._report.summary = event
                        elif isinstance(event, pb.BulkAck):
                            self._tracker.settle(event)
                        elif not self.is_open:
                            await self._on_open(event, loads)
            except LoadInterrupted as failure:
                if not self.is_open and isinstance(failure.cause, LoadAborted | LoadExpired):
                    # The load can't be opened, but it exists: report how far it came.
                    self._set_counts(await self._get_load(loads))
                    self.is_open = True
                raise

    async def _refuse_earlier_load(self, loads: BulkServiceAsyncStub) -> None:
        """Raise FailedPrecondition if an earlier release has begun a load of this file.

        It did not send rows that it could not parse, so its offsets are not positions in the file.
        """
        request = pb.GetBulkLoadRequest(load_id=self._earlier_id, caller=self._options.caller)
        if not self._earlier_id:
            return
        with suppress(LoadNotFound):
            load = await Backoff(retry_connect=False).call(loads.GetBulkLoad, request)
            state = pb.BulkLoad.State.Name(load.state)
            raise FailedPrecondition(
                f"an earlier release of this command began the load {self._earlier_id} of this file: "
                f"{state}, {pluralize(load.next_offset, 'row')}. This release counts rows differently: "
                "continue it with that release, or add --load-id NAME to load the file again"
            )

    async def _on_open(self, opened: pb.BulkOpened, loads: BulkServiceAsyncStub) -> None:
        self.is_open = True
        self._backoff.reset()
        if not (opened.next_offset or self._options.caller):
            return
        load = await self._get_load(loads)
        self._report.was_finished = load.state == pb.BulkLoad.FINISHED
        if self._report.was_finished:
            await self._refuse_undone(load, loads)
        if not self._report.was_finished:
            owner = f" the load of {opened.caller}" if self._options.caller else ""
            echo(f"resuming{owner} at row {opened.next_offset + 1:,}", err=True)
        # With return_ids the loader sends every row again, and their acks are counted instead.
        if not self._options.return_ids:
            self._set_counts(load)
            self._report.rows = self._report.skipped_rows = opened.next_offset

    async def _refuse_undone(self, load: pb.BulkLoad, loads: BulkServiceAsyncStub) -> None:
        """Raise FailedPrecondition if the caller has undone the load: its rows are not there any more."""
        for is_forced in (False, True):
            name = undo_name(load, 1, is_forced=is_forced)
            with suppress(LoadNotFound):
                undo = await self._backoff.call(loads.GetBulkLoad, pb.GetBulkLoadRequest(load_id=name))
                if undo.deleted:
                    raise FailedPrecondition(
                        f"the load {load.load_id} was undone by {name}; use another --load-id to load the "
                        "file again"
                    )

    async def _get_load(self, loads: BulkServiceAsyncStub) -> pb.BulkLoad:
        request = pb.GetBulkLoadRequest(load_id=self._options.load_id, caller=self._options.caller)
        load: pb.BulkLoad = await self._backoff.call(loads.GetBulkLoad, request)
        return load

    def _set_counts(self, load: pb.BulkLoad) -> None:
        self._report.rows = load.next_offset
        self._report.failed = load.failed

    async def _messages(self, loads: BulkServiceAsyncStub, start: int) -> AsyncGenerator[Message, None]:
        """Yield the rows from offset `start` on, an empty one for each row that can't be parsed.

        The server refuses an empty row, so that it has a failure too, and the offset of a row is its position
        in the file: rows that an earlier run has settled are skipped without parsing them. If they failed
        then, they are written to the rejects again, with the failures that the server has stored.
        """
        request = pb.ListBulkLoadFailuresRequest(
            load_id=self._options.load_id, caller=self._options.caller, page_size=PAGE_SIZE
        )
        failures = pages(partial(self._backoff.call, loads.ListBulkLoadFailures), request)
        empty, offset = self._entity.message(), 0
        async with aclosing(failures), aclosing(self._source.chunks(start)) as chunks:
            failure = await anext(failures, None) if start else None
            async for chunk in chunks:
                end = offset + len(chunk)
                while failure and failure.offset < min(start, end):
                    row = chunk[failure.offset - offset]
                    row.parse()
                    self._tracker.reject(row, failure)
                    failure = await anext(failures, None)
                for row in chunk[max(start - offset, 0) :]:
                    if 0 < self._options.max_failures < self._report.failed:
                        raise TooManyFailures(f"more than {self._options.max_failures:,} rows failed")
                    self._tracker.add(row)
                    yield empty if row.message is None else row.message
                offset = end
        if offset < start:
            rows = pluralize(offset, "row")
            raise FailedPrecondition(f"the file has only {rows}, but the load already has {start:,}")

    def _progress(self) -> tuple[int, str]:
        return self._source.bytes_read, self._report.progress()


def _choice(enum: Any) -> click.Choice[str]:
    return click.Choice(enum.keys(), case_sensitive=False)


@click.command(context_settings={"show_default": True})
@click.argument("entity", type=click.Choice(list(ENTITIES)))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@server_options
@click.option("--load-id", help=LOAD_ID)
@click.option("--caller", help=CALLER)
@click.option("--update", is_flag=True, help="Update existing rows, by id.")
@click.option("--restore", is_flag=True, help=RESTORE)
@click.option("--delete", is_flag=True, help=DELETE)
@click.option("--on-missing", type=click.Choice(list(ON_MISSING)), default="fail", help=MISSING)
@click.option("--restrict", is_flag=True, help="Do not delete users who have posts.")
@click.option("--mirror", is_flag=True, help=MIRROR)
@click.option(
    "--key", type=click.Choice(["email", "id"]), default="email", help="Column that --mirror matches."
)
@click.option("--filter", "filter_", callback=check_filter, help=FILTER)
@click.option(
    "--deactivate", is_flag=True, help="Set is_active to false in place of deleting, with --mirror."
)
@click.option("--max-deletes", type=DeleteLimitType(), default="10%", help=MAX_DELETES)
@click.option("--dry-run", is_flag=True, help="Print the plan of --mirror, and write nothing.")
@click.option("--update-mask", help=UPDATE_MASK)
@click.option("--on-conflict", type=_choice(pb.BulkOptions.OnConflict), default="fail", help=ON_CONFLICT)
@click.option("--batch-rows", type=Integer(1), default=BATCH_ROWS, help="Maximum rows per transaction.")
@click.option("--atomicity", type=_choice(pb.BulkOptions.Atomicity), default="row", help=ATOMICITY)
@click.option("--validate-only", is_flag=True, help="Run all checks, but write nothing.")
@click.option("--max-failures", type=Integer(0), default=0, help="Stop if more rows fail; 0 means no limit.")
@click.option("--format", "file_format", type=click.Choice(list(FORMATS)), help=FORMAT)
@click.option("--columns", "mapping", metavar="FIELD=COLUMN,…", multiple=True, help=COLUMNS)
@click.option("--ignore", metavar="NAME", multiple=True, help=IGNORE)
@click.option("--delimiter", type=click.Choice(list(DELIMITERS)), help=DELIMITER)
@click.option("--encoding", help=ENCODING)
@click.option("--null", metavar="TEXT", multiple=True, help=NULL)
@click.option("--rejects", type=PATH, help=REJECTS)
@click.option("--json", "is_json", is_flag=True, help="Print the summary as a JSON object.")
def load(
    entity: str,
    file: str,
    target: Target,
    update_mask: str | None,
    batch_rows: int,
    file_format: str | None,
    mapping: Sequence[str],
    ignore: Sequence[str],
    delimiter: str | None,
    encoding: str | None,
    null: Sequence[str],
    rejects: Path | None,
    on_missing: str,
    key: str,
    filter_: str,
    max_deletes: DeleteLimit,
    *,
    restrict: bool,
    deactivate: bool,
    dry_run: bool,
    is_json: bool,
    **options: Any,
) -> None:
    """Load users or posts from FILE: CSV, JSON or Parquet, plain, gzip or zstd. - is standard input.

    Columns of users: email, full_name, is_active, hashed_password. Columns of posts: title, content, and
    author_id or author_email. --update needs id. --restore also reads id, created_at, updated_at, version.
    --delete reads id or email, and version; of posts id and version.
    Other columns are ignored, unless their name is near that of a known one; then the load stops.
    docs/importing.md describes the files of other systems.

    A row that fails does not affect the others. It is written to a file of rejects, with the reason as
    `_error`. Fix the rows there, and load that file. An existing file of rejects is never overwritten.

    --mirror makes the users that match --filter equal to the file. It prints a plan first. docs/mirroring.md
    describes it.

    To resume a load that was stopped, run the same command again. From standard input, this requires
    --load-id and the same rows.

    The exit status is 0 if all rows were loaded, 1 if some failed, 2 if the load did not start or finish. If
    Ctrl-C or SIGTERM ended it, the status is 130 or 143.
    """
    operation = operation_of(entity)
    kind = ENTITIES[entity].keyed() if operation == "delete" else ENTITIES[entity]
    masked = update_mask.replace(" ", "").split(",") if update_mask else []
    if not masked and (operation == "update" or options["on_conflict"] == "UPDATE"):
        option = "--update" if operation == "update" else "--on-conflict update"
        raise click.UsageError(f"{option} requires --update-mask")
    names = kind.columns(operation, masked)
    if key == "id":
        names = ("id", *names)
    columns = Columns(kind, names, parse_columns(mapping, names), ignore)
    kind_of_file = FORMATS[file_format or format_name(file, LOADED_ENDINGS)]
    source = Source(file, _configure(kind_of_file, columns, delimiter, encoding, null))
    if operation == "mirror":
        mirror_options = MirrorOptions(
            key, filter_, max_deletes, batch_rows, deactivates=deactivate, is_dry_run=dry_run
        )
        path = _rejects_path(rejects, file, Json.suffix)
        sys.exit(_mirror(source, target, mirror_options, path, is_json=is_json))
    reading = {
        "columns": columns.mapping,
        "ignore": ignore,
        "delimiter": delimiter,
        "encoding": encoding,
        "null": null,
    }
    bulk_options = pb.BulkOptions(
        restore=operation == "restore",
        on_missing=ON_MISSING[on_missing],
        restrict=restrict,
        update_mask=FieldMask(paths=masked),
        # When a batch that failed as a whole is replayed, only the ids show which of its rows were written.
        return_ids=options["atomicity"] == "BATCH",
        **{name: value for name, value in options.items() if name not in FLAGS},
    )
    if bulk_options.validate_only and bulk_options.caller:
        raise click.UsageError("--caller resumes a load, and --validate-only does not; use one of them")
    if bulk_options.validate_only:
        bulk_options.load_id = ""  # nothing is stored, so there is nothing to resume
    earlier_id = ""
    if not (bulk_options.load_id or bulk_options.validate_only):
        bulk_options.load_id, earlier_id = _derive_load_ids(
            source, f"{entity}-{operation}", bulk_options, reading
        )
    rejects_file = RejectsFile(_rejects_path(rejects, file, source.format.suffix), source.format)
    report = LoadReport(
        source.name, source.format, bulk_options, rejects_file, is_delete=operation == "delete"
    )
    job = Load(kind, source, bulk_options, report, rejects_file, earlier_id)
    verb = VERBS.get(operation, "BulkCreate")
    collect_rarely()
    with (
        _report_ignored(columns),
        _report_errors(job, report, source.name, target),
        closing(rejects_file),
    ):
        asyncio.run(job.run(target, verb, batch_rows))
    if not report.rows:
        echo(f"warning: {source.name} has no rows", err=True)
    if is_json:
        echo(json.dumps(report.as_dict()))
    else:
        echo(*report.lines())
    sys.exit(1 if report.failed else 0)


def _mirror(source: Source, target: Target, options: MirrorOptions, rejects: Path, *, is_json: bool) -> int:
    from service.cli.mirror.command import run_mirror  # noqa: PLC0415  (SQLAlchemy takes 0.3 s)

    columns = source.format.columns
    rejects_file = RejectsFile(rejects, Json(columns))
    collect_rarely()
    with _report_ignored(columns):
        return run_mirror(source, target, options, rejects_file, is_json=is_json)


@contextmanager
def _report_ignored(columns: Columns) -> Iterator[None]:
    try:
        yield
    finally:
        if columns.ignored:
            echo(f"ignored columns: {', '.join(columns.ignored)}", err=True)


@contextmanager
def _report_errors(job: Load, report: LoadReport, name: str, target: Target) -> Iterator[None]:
    """Exit on a signal, or raise UsageError if the load fails; both say how far it came."""
    try:
        with exit_on_signal(lambda: f": {report.unfinished(can_resume=True)}"):
            yield
    except (SourceError, TooManyFailures, OSError) as error:
        raise UsageError(f"{name}: {error}; {report.unfinished(can_resume=False)}") from None
    except RosterError as failure:
        cause = failure.cause if isinstance(failure, LoadInterrupted) else failure
        if not job.is_open:
            raise UsageError(f"nothing was loaded: {_name_options(target.explain(cause))}") from None
        state = report.unfinished(can_resume=is_retryable(cause))
        message = target.explain(cause) if isinstance(cause, Unauthenticated) else failure.message
        raise UsageError(f"{name}: the load stopped: {_name_options(message)}; {state}") from None


def _name_options(message: str) -> str:
    """Replace the fields of BulkOptions in a server's message by the options of this command."""
    return OPTION.sub(lambda found: f"--{found[1] or found[2]}".replace("_", "-"), message)


def _configure(
    kind: Callable[[Columns], FileFormat],
    columns: Columns,
    delimiter: str | None,
    encoding: str | None,
    null: Sequence[str],
) -> FileFormat:
    """Return a file format with the options for CSV; raises UsageError."""
    if not (delimiter or encoding or null):
        return kind(columns)
    if kind is not Csv:
        raise click.UsageError("--delimiter, --encoding and --null are for CSV")
    try:
        codec = codecs.lookup(encoding or "utf-8")
        "".encode(codec.name)  # not every codec is one of texts
    except LookupError:
        raise click.UsageError(
            f"--encoding {encoding} is not known; use one such as utf-8 or cp1252"
        ) from None
    return Csv(columns, DELIMITERS.get(delimiter or "", ""), codec.name, null)


def _derive_load_ids(
    source: Source, prefix: str, options: pb.BulkOptions, reading: Mapping[str, object]
) -> tuple[str, str]:
    """Return an id that is the same whenever the same rows would be written, and that of earlier releases.

    Both are "" for standard input.
    """
    content = source.digest()
    if not content:
        return "", ""
    effective = pb.BulkOptions()
    effective.CopyFrom(options)
    effective.ClearField("max_failures")
    effective.ClearField("caller")
    parts = [content, source.format.name.encode(), effective.SerializeToString(deterministic=True)]
    earlier = "" if any(reading.values()) else _join_id(prefix, parts)
    return _join_id(prefix, [*parts, json.dumps(reading, sort_keys=True).encode()]), earlier


def _join_id(prefix: str, parts: Sequence[bytes]) -> str:
    return f"{prefix}-{sha256(b'/'.join(parts)).hexdigest()[:32]}"


def _rejects_path(rejects: Path | None, file: str, suffix: str) -> Path:
    source = Path("stdin" if file == STDIN else without_compression(file))
    path = rejects or source.with_name(f"{source.stem}.rejects.{suffix}")
    if path.exists() and file != STDIN and path.samefile(file):
        raise UsageError(f"{path} is the file to load; choose another file with --rejects")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"can't write to directory {path.parent}; choose another file with --rejects")
    return path
