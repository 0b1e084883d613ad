"""One run of `roster load users FILE --mirror`."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from roster.client import BulkLoader, Consistency, LoadInterrupted
from roster.consistency import PRIMARY
from roster.errors import InvalidField, PermissionDenied, TooLarge
from roster.v1.bulk_pb2 import BulkAck, BulkOptions, RowFailure
from service.cli.export import Columns as Exported, Export
from service.cli.formats.write import json_line
from service.cli.mirror.difference import Counts, Difference
from service.cli.mirror.filters import Conditions, row_conditions
from service.cli.mirror.options import MirrorOptions
from service.cli.mirror.report import MirrorReport
from service.cli.mirror.steps import Step, steps, with_parked
from service.cli.mirror.values import FileRow, compared_columns, row_from_message, users_from_columns
from service.cli.progress import show_progress
from service.cli.rejects import RejectsFile
from service.cli.rows import USERS, Row
from service.cli.source import Source
from service.cli.terminal import Target, pluralize

MAX_SHOWN = 5  # problems
FEWER = 10  # times fewer rows in a message, if those of one have too many posts

T = TypeVar("T")


class PlanRefused(Exception):
    """Nothing was written, because of these problems."""

    def __init__(self, message: str, *problems: str) -> None:
        super().__init__(message)
        self.problems = problems


class Mirror:
    """Reads the file and the users that match, compares them, and writes the difference."""

    def __init__(
        self,
        source: Source,
        difference: Difference,
        options: MirrorOptions,
        report: MirrorReport,
        rejects: RejectsFile,
    ) -> None:
        self._source = source
        self._found = source.format.columns.found
        self._difference = difference
        self._options = options
        self._report = report
        self._rejects = rejects
        self._steps: list[Step] = []

    async def plan(self, target: Target) -> None:
        """Compare the file with the users that match.

        Raises PlanRefused, SourceError, OSError, RosterError, LoadInterrupted.
        """
        # A filter or a file that can't be used is found before anything is read from the server.
        conditions = await row_conditions(
            self._options.filter, self._difference, deactivates=self._options.deactivates
        )
        await self._source.prefetch()
        self._check_key()
        async with show_progress(self._source.bytes_total, self._progress):
            await self._read_rows()
            async with target.channel(Consistency(PRIMARY)) as connection:
                await self._read_users(connection)
                await self._compute(self._difference.sort)
                await self._compute(self._check_keys)
                self._report.counts = await self._compute(self._compare)
                await self._compute(partial(self._check_rows, conditions))
                self._check_limit(self._report.counts)
                await self._validate(connection)

    async def write(self, target: Target) -> None:
        """Carry out the plan; raises OSError, LoadInterrupted."""
        async with (
            target.channel(Consistency(PRIMARY)) as connection,
            show_progress(0, lambda: (0, self._report.progress())),
        ):
            for step in self._steps:
                async with aclosing(self._send(connection, step, step.options)) as acks:
                    async for ack in acks:
                        self._settle(step, ack)
                if step.outcome == "parked":
                    self._difference.count_parks()

    def _progress(self) -> tuple[int, str]:
        return self._source.bytes_read, self._report.progress()

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run statements that may take minutes in a thread; a signal interrupts them."""
        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            self._difference.interrupt()
            raise

    def _check_key(self) -> None:
        key = self._options.key
        if self._found and key not in self._found:
            raise PlanRefused(
                f"the file has no column {key}, which identifies the users; if it has another name, add "
                f"--columns {key}=NAME"
            )

    async def _read_rows(self) -> None:
        problems: list[str] = []
        async with aclosing(self._source.chunks(0)) as chunks:
            async for chunk in chunks:
                rows: list[FileRow] = []
                for row in chunk:
                    try:
                        rows.append(_file_row(row, self._options.key))
                    except InvalidField as error:
                        problems.append(self._at(row.number, error.message))
                self._difference.add_rows(rows)
                self._report.rows += len(rows)
                if len(problems) >= MAX_SHOWN:
                    break
        self._refuse("rows of the file can't be used", problems)

    async def _read_users(self, connection: grpc.aio.Channel) -> None:
        def write(columns: Exported) -> None:
            users = users_from_columns(columns)
            self._difference.add_users(users)
            self._report.users += len(users)

        filter_ = self._options.filter
        if self._options.key == "id" and filter_.strip():
            filter_ = with_parked(filter_)
        await Export(USERS, filter_).copy(connection, write)

    def _check_keys(self) -> None:
        """Raise PlanRefused if the rows can't be matched with the users."""
        for column in dict.fromkeys((self._options.key, "email")):
            pairs = self._difference.repeated(column, MAX_SHOWN)
            problems = [f"{self._line(first)} and {self._line(last)}" for first, last in pairs]
            self._refuse(f"rows of the file have the same {column}", problems)
        users = [f"users {first} and {last}" for first, last in self._difference.ambiguous(MAX_SHOWN)]
        self._refuse(
            "two users have the e-mail of one row. If it changed hands during the export, run the command "
            "again; if an earlier release stored it in two forms, delete one of the users",
            users,
        )

    def _compare(self) -> Counts:
        options = self._options
        columns = compared_columns(self._found, options.key, deactivates=options.deactivates)
        planned = steps(self._difference, columns, options.filter, deactivates=options.deactivates)
        counts = self._difference.compare(columns, keeps_inactive=options.deactivates)
        self._steps = [step for step in planned if not self._difference.is_empty(step.table)]
        first = islice(self._difference.read(self._difference.deletes), MAX_SHOWN)
        self._report.removed = [f"user {row.id} ({row.email})" for row in first]
        return counts

    def _check_rows(self, conditions: Conditions) -> None:
        """Raise PlanRefused if rows that are to be written break a rule, or don't match the filter."""
        unusable = [self._at(*problem) for problem in self._difference.unusable(MAX_SHOWN)]
        self._refuse("rows of the file can't be used", unusable)
        outside = self._difference.outside(conditions, MAX_SHOWN)
        self._refuse("rows of the file do not match the filter", map(self._line, outside))
        if self._options.deactivates:
            kept = self._difference.kept_emails(MAX_SHOWN)
            self._refuse(
                "rows of the file have the e-mail of a user who is not in the file, and keeps it with "
                "--deactivate",
                map(self._line, kept),
            )

    def _check_limit(self, counts: Counts) -> None:
        limit, verb, users = self._options.limit, "deleted", "users"
        if self._options.deactivates:
            verb, users = "deactivated", "active users"
        scope = "that match" if self._options.filter else "(there is no --filter)"
        if limit.allows(counts.deletes, counts.removable):
            return
        share = 100 * counts.deletes / counts.removable
        which = "has no rows" if not counts.rows else f"has {pluralize(counts.rows, 'row')}"
        raise PlanRefused(
            f"the file {which}: {counts.deletes:,} of the {counts.removable:,} {users} {scope} would be "
            f"{verb} ({share:.1f}%), more than --max-deletes {limit.text}; if the file is complete, add "
            f"--max-deletes {counts.deletes}",
            *self._report.removed,
        )

    async def _validate(self, connection: grpc.aio.Channel) -> None:
        """Check with the server that the plan can be carried out, and count the posts of deleted users.

        Otherwise a caller without the right to create would delete first, and then stop.
        """
        for step in self._steps:
            with _name_role(step):
                await self._validate_step(connection, step)

    async def _validate_step(self, connection: grpc.aio.Channel, step: Step) -> None:
        options = BulkOptions()
        options.CopyFrom(step.options)
        options.load_id, options.validate_only = "", True
        # Without a filter, every user is known: who has an e-mail is in the plan.
        checks_emails = bool(self._options.filter) and step.writes_emails
        sends_rows = checks_emails or step.outcome == "deleted"
        posts, taken = 0, list[int]()
        async with aclosing(self._send(connection, step, options, is_empty=not sends_rows)) as acks:
            async for ack in acks:
                if ack.offset == 0:  # maybe again: all rows are sent again in smaller messages
                    posts, taken = 0, []
                posts += ack.deleted_posts
                taken += [failure.offset for failure in ack.failures if self._is_taken(step, failure)]
                if len(taken) >= MAX_SHOWN:
                    break
        self._report.planned_posts += posts
        numbers = [self._difference.row(step.table, offset).number for offset in taken[:MAX_SHOWN]]
        self._refuse(
            "the key or the e-mail of rows of the file belongs to users who do not match the filter",
            map(self._line, numbers),
        )

    def _is_taken(self, step: Step, failure: RowFailure) -> bool:
        """Return whether a user who does not match the filter has the key of a row."""
        if failure.reason == "EMAIL_TAKEN":  # maybe of a user who will be deleted, or gets another one
            return not self._difference.has_email(self._difference.row(step.table, failure.offset).email)
        return failure.reason == "ID_TAKEN"

    async def _send(
        self, connection: grpc.aio.Channel, step: Step, options: BulkOptions, *, is_empty: bool = False
    ) -> AsyncGenerator[BulkAck, None]:
        """Send the rows of a step, and yield the acks; raises LoadInterrupted, TooLarge.

        If the users of a message have too many posts together, the rest is sent in smaller messages. Without
        a load id, all rows are sent again.
        """
        batch_rows = self._options.batch_rows
        while True:
            method, request = USERS.rpc(connection, step.verb)
            loader = BulkLoader(method, request, options, batch_rows=batch_rows, connection=connection)
            rows = _no_rows if is_empty else lambda start: self._messages(step, options, start)
            try:
                async with aclosing(loader.run(rows)) as events:
                    async for event in events:
                        if isinstance(event, BulkAck):
                            yield event
            except LoadInterrupted as failure:
                if not isinstance(failure.cause, TooLarge):
                    raise
                if batch_rows == 1:
                    user = self._difference.row(step.table, failure.acknowledged)
                    raise TooLarge(f"user {user.id}: {failure.cause.message}") from None
                batch_rows = max(1, batch_rows // FEWER)
            else:
                return

    async def _messages(self, step: Step, options: BulkOptions, start: int) -> AsyncGenerator[Message, None]:
        for row in self._difference.read(step.table, start):
            self._report.has_sent = not options.validate_only
            yield step.message(row)

    def _settle(self, step: Step, ack: BulkAck) -> None:
        if step.outcome == "parked":  # the update of a user who could not be parked is reported
            for failure in ack.failures:
                self._difference.remove_park(failure.offset)
            return
        self._report.add_ack(step.outcome, ack)
        for failure in ack.failures:
            self._reject(step, failure)

    def _reject(self, step: Step, failure: RowFailure) -> None:
        row = self._difference.row(step.table, failure.offset)
        names = [name for name in ("id", "email", "full_name", "is_active") if name in row._fields]
        values: dict[str, Any] = {"not": step.outcome}
        values |= {name: getattr(row, name) for name in names}
        number = row.number if "number" in row._fields else 0
        self._report.add_failure(failure, self._line(number) if number else f"user {row.id}")
        original = json_line({name: value for name, value in values.items() if value is not None})
        self._rejects.write(Row(number, len(original), original, lambda _: USERS.message()), failure)

    def _at(self, number: int, problem: str) -> str:
        return f"{self._line(number)}: {problem}"

    def _line(self, number: int) -> str:
        return f"{self._source.format.unit} {number:,}"

    def _refuse(self, message: str, problems: Iterable[str]) -> None:
        """Raise PlanRefused if there are problems."""
        if shown := list(problems)[:MAX_SHOWN]:
            raise PlanRefused(message, *shown)


@contextmanager
def _name_role(step: Step) -> Iterator[None]:
    """Report the role that the caller lacks."""
    try:
        yield
    except LoadInterrupted as failure:
        if not isinstance(failure.cause, PermissionDenied):
            raise
        message = f"some users are to be {step.outcome}, for which the caller needs the role {step.role}"
        raise PermissionDenied(message) from None


def _file_row(row: Row[Any], key: str) -> FileRow:
    """Return the values of a row; raises InvalidField."""
    if row.failure:
        raise InvalidField(row.failure.message, field=row.failure.field)
    message: Any = row.message
    return row_from_message(row.number, message, key)


async def _no_rows(start: int) -> AsyncGenerator[Message, None]:  # noqa: ARG001
    """Yield nothing: the server checks the options and the caller's rights."""
    for message in list[Message]():
        yield message
