"""BatchCommitter: writes the batches of one stream in order, exactly once, and again if the database fails.

Several batches are written at the same time, each in a transaction of its own. They commit in the order of
their offsets: before its commit, each waits for that of the batch before. If a commit fails, the batches
after it roll back, and all of them are tried again one at a time. If the answer to a commit is lost, the
watermark in the database says whether it happened.
"""

import asyncio
import random

from roster.errors import DatabaseUnavailable, LoadExpired, OffsetGap, OutcomeUnknown
from service.bulk.operation import Operation
from service.bulk.pending import FAULTS, BatchState, PendingBatch, PreviousNotCommitted
from service.db.bulk.batch import Outcome, WriteOptions
from service.db.bulk.writer import BulkWriter
from service.db.engine import Database
from service.loads.model import Load
from service.loads.repository import LoadRepository

ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.1


class BatchCommitter:
    """Commits the batches of one stream and, if its load has a name, records their outcomes."""

    def __init__(
        self, database: Database, operation: Operation, options: WriteOptions, load: Load | None
    ) -> None:
        self.watermark = load.next_offset if load else 0  # the offset after the last committed row
        self._database = database
        self._operation = operation
        self._options = options
        self._load = load
        self._is_uncertain = False  # the answer to a commit was lost

    async def commit(self, pending: PendingBatch) -> Outcome:
        """Commit a batch and return the outcome of its message.

        Raises OffsetGap or one of FAULTS if the message is refused, and errors that end the stream.
        """
        try:
            # First attempt: at the same time as other batches.
            pending.move_to(BatchState.WRITING)
            outcome = await self._first_attempt(pending)
            if outcome is None:
                # The batches after this one roll back. It is tried alone once those before are settled.
                pending.move_to(BatchState.RETRYING)
                await self._require_commit_of(pending.previous)
                pending.previous = None
                outcome = await self._retry(pending)
            self.watermark = max(self.watermark, pending.end)
            pending.move_to(BatchState.COMMITTED)
        finally:
            # Whatever happened, wake the next batch and drop the rows.
            if not pending.is_committed:
                pending.move_to(BatchState.REFUSED)
            pending.release()
        if not pending.replayed:
            return outcome
        pending.replayed_outcome.extend(outcome)
        return pending.replayed_outcome

    async def replay(self, start: int, end: int) -> Outcome:
        """Return the first outcome of committed rows; raises LoadExpired."""
        if self._load is None or start == end:
            return Outcome()
        async with self._database.read() as session:
            outcome = await LoadRepository(session, self._load.caller).outcome(self._load, start, end)
        if len(outcome.ids) < end - start:
            raise expired()
        return outcome

    async def resolve_uncertainty(self) -> None:
        """Read the watermark if the answer to a commit was lost: the commit may have happened."""
        if self._load and self._is_uncertain:
            async with self._database.read() as session:
                self.watermark = await LoadRepository(session, self._load.caller).watermark(self._load)
            self._is_uncertain = False

    async def _first_attempt(self, pending: PendingBatch) -> Outcome | None:
        """Write a batch and commit it after the one before; return None if it has to be tried alone."""
        if self._is_uncertain:
            return None
        try:
            return await self._write(pending)
        except (PreviousNotCommitted, *FAULTS):
            return None
        except OutcomeUnknown:
            # Only a named load has a watermark that says whether the batch is committed.
            if self._load is None:
                raise
            self._is_uncertain = True
            return None

    async def _retry(self, pending: PendingBatch) -> Outcome:
        """Try a batch alone, with pauses; raises the last fault."""
        for attempt in range(1, ATTEMPTS):
            await asyncio.sleep(FIRST_PAUSE_SECONDS * attempt * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                await self.resolve_uncertainty()
                if pending.end <= self.watermark:  # it was committed, only the answer was lost
                    return await self.replay(pending.offset + pending.replayed, pending.end)
                return await self._write(pending)
            except FAULTS as error:
                if attempt == ATTEMPTS - 1:  # also for a timeout: it may succeed later
                    raise DatabaseUnavailable(error.message) from error
            except OutcomeUnknown:
                if self._load is None:
                    raise
                self._is_uncertain = True
        raise DatabaseUnavailable(
            "the answer to a commit was lost; send the message again to learn its outcome"
        )

    async def _write(self, pending: PendingBatch) -> Outcome:
        """Write the new rows of a batch in a transaction that commits after the one before."""
        # A message with `finish` alone, or one that is replayed, has no rows to write.
        if not pending.batch.size:
            await self._require_commit_of(pending.previous)
            return Outcome()
        # Reserve restored ids in a short transaction of their own: it locks out other writers.
        if self._options.restores and self._options.writes(pending.batch):
            async with self._database.bulk() as session:
                await BulkWriter(session, self._operation.table).reserve_ids(pending.batch)
        async with self._database.bulk() as session:
            # Write the rows. This is the long part, and runs at the same time as other batches.
            outcome = await self._operation.write(session, pending.batch, self._options)
            # Commits follow offset order, so that one watermark describes the load.
            await pending.wait_for_previous()
            # Rows and outcome commit together. The load's row is locked only now, for a short time.
            await pending.complete(outcome, self._options, self._operation.table.unique)
            if self._load:
                loads = LoadRepository(session, self._load.caller)
                await loads.record(self._load, pending.offset + pending.replayed, outcome)
        return outcome

    async def _require_commit_of(self, previous: PendingBatch | None) -> None:
        if previous:
            await previous.settle()
            if not previous.is_committed:
                raise gap(self.watermark)


def expired() -> LoadExpired:
    """Return the error for a load whose outcomes have been deleted."""
    return LoadExpired("the load has expired and its outcomes are deleted; use another load_id for new rows")


def gap(expected: int) -> OffsetGap:
    """Return the error for a message that does not continue the load."""
    return OffsetGap(
        f"the rows from offset {expected} on are missing; send those first",
        field="offset",
        expected_offset=expected,
    )
