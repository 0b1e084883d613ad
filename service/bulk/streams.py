"""The bulk-stream protocol, written once for every entity.

A message = a batch = a transaction = an ack. The next message is read when the last one is
acknowledged, so that a stream holds two of them at most, however long the load is.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from roster.v1.bulk_pb2 import BulkLoad, BulkWriteResponse
from service.bulk.convert import (
    error_to_message,
    opened_to_message,
    outcome_to_message,
    summary_to_message,
)
from service.bulk.operation import Operation, StreamOptions
from service.db.base import MAX_ID
from service.db.bulk.batch import Batch, Outcome
from service.db.engine import Database
from service.errors import (
    InvalidField,
    InvalidOptions,
    OffsetGap,
    RosterError,
    StatementTimeout,
    TooLarge,
    TooManyFailures,
    Unavailable,
)

MAX_ROWS = 5000
MAX_BYTES = 4 << 20
ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.1


class BulkStreams:
    """Runs the bulk streams of all entities against one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(
        self, requests: AsyncIterator[Any], operation: Operation
    ) -> AsyncGenerator[BulkWriteResponse]:
        """Yield the events of one stream.

        Its end is no success: a cancelled or killed upload looks like one. Only `finish` completes a load.
        """
        stream: _Stream | None = None
        async for request in requests:
            if stream is None:
                options = StreamOptions.from_message(request.options, operation)
                stream = _Stream(self._database, operation, options)
                yield opened_to_message("", 0, MAX_ROWS, MAX_BYTES)
            elif request.HasField("options"):
                raise InvalidOptions("options come in the first message of a stream only", field="options")
            if ack := await stream.acknowledge(request):
                yield ack
            if stream.has_failed_too_often():
                yield stream.summary(BulkLoad.STATE_UNSPECIFIED)
                raise TooManyFailures("more rows failed than max_failures allows; what is acknowledged is in")
            if request.finish and stream.is_whole():
                yield stream.summary(BulkLoad.FINISHED)
                return
        if stream is None:
            raise InvalidOptions("the stream ended before its first message, which has options or rows")
        yield stream.summary(BulkLoad.STATE_UNSPECIFIED)


class _Stream:
    def __init__(self, database: Database, operation: Operation, options: StreamOptions) -> None:
        self._database = database
        self._operation = operation
        self._options = options
        self._next_offset = 0  # behind the last row that is recorded
        self._end = 0  # behind the last message, recorded or not
        self._totals = Outcome([], {})

    async def acknowledge(self, request: Any) -> BulkWriteResponse | None:
        """Write the rows of a message and return its ack, or the ack that says why none is recorded.

        Without rows there is none, unless the message finishes a load of which rows are missing.
        """
        rows = getattr(request, self._operation.rows)
        offset = request.offset if request.HasField("offset") else self._end
        if not rows and (offset == self._next_offset or not request.finish):
            self._end = offset
            return None
        try:
            self._check(offset, request.ByteSize(), len(rows))
            # Once, and of a message that is not too large: to make 8 million wrappers takes 1.5 GiB.
            batch = self._operation.batch(list(rows), self._options.write)
            outcome = await self._written(batch)
        except (InvalidField, TooLarge, OffsetGap, Unavailable, StatementTimeout) as error:
            self._end = min(max(offset, 0), MAX_ID) + len(rows)
            return error_to_message(offset, self._next_offset, error)
        self._next_offset = self._end = offset + len(rows)
        self._count(outcome)
        return outcome_to_message(offset, outcome, return_ids=self._options.return_ids)

    def summary(self, state: BulkLoad.State.ValueType) -> BulkWriteResponse:
        """Return the last event."""
        return summary_to_message(self._next_offset, self._totals, state)

    def is_whole(self) -> bool:
        """Tell whether every row that was sent is recorded."""
        return self._end == self._next_offset

    def has_failed_too_often(self) -> bool:
        """Tell whether more rows failed than the caller wants to see."""
        return 0 < self._options.max_failures < self._totals.failed

    def _check(self, offset: int, size: int, rows: int) -> None:
        if offset < 0:
            raise InvalidField("offset must not be negative", field="offset")
        if rows > MAX_ROWS or size > MAX_BYTES:
            raise TooLarge(
                f"a message has at most {MAX_ROWS:,} rows and {MAX_BYTES:,} bytes; send these in several",
                field=self._operation.rows,
            )
        if offset != self._next_offset:
            raise _gap(offset, self._next_offset)

    async def _written(self, batch: Batch) -> Outcome:
        """Write a batch in a transaction of its own; a fault of the database is tried again, with a pause."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._database.bulk() as session:
                    return await self._operation.write(session, batch, self._options.write)
            except (Unavailable, StatementTimeout):
                if attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(FIRST_PAUSE_SECONDS * attempt * random.uniform(0.5, 1.5))  # noqa: S311
        raise AssertionError("unreachable")

    def _count(self, outcome: Outcome) -> None:
        for name in ("created", "updated", "skipped", "failed"):
            setattr(self._totals, name, getattr(self._totals, name) + getattr(outcome, name))


def _gap(offset: int, expected: int) -> RosterError:
    if offset > expected:
        sentence = f"the rows from offset {expected} on are missing; go back there"
    else:
        sentence = (
            f"offset {offset} is recorded already, and a load without load_id keeps no outcomes; "
            f"go on at {expected}"
        )
    return OffsetGap(sentence, field="offset", expected_offset=expected)
