"""How the messages of a stream are recorded: in order, exactly once, and again where the database fails.

Batches are copied at the same time, each in a transaction of its own, and committed in the order of
their offsets: each waits for the one before it. When one fails, those behind it roll back; then they
are tried again one at a time.
"""

import asyncio
import random

from service.bulk.operation import Operation
from service.bulk.pending import FAULTS, Slot, Superseded, committed
from service.db.bulk.batch import Outcome, WriteOptions
from service.db.bulk.writer import BulkWriter
from service.db.engine import Database
from service.errors import (
    DatabaseUnavailable,
    LoadExpired,
    OffsetGap,
    OutcomeUnknown,
)
from service.loads.repository import Load, LoadRepository

ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.1


class Recorder:
    """Records the messages of one stream and, where its load has a name, their outcomes."""

    def __init__(
        self, database: Database, operation: Operation, options: WriteOptions, load: Load | None
    ) -> None:
        self.watermark = load.next_offset if load else 0  # behind the last row that is recorded
        self._database = database
        self._operation = operation
        self._options = options
        self._load = load
        self._is_uncertain = False  # a commit's answer was lost

    async def record(self, slot: Slot) -> Outcome:
        """Record a message; raises OffsetGap or one of FAULTS where it can't be, or what ends the stream."""
        try:
            outcome = await self._first_attempt(slot)
            slot.batch.ids_drawn.set()
            slot.is_committed.set_result(outcome is not None)
            if outcome is None:
                await self._require(slot.previous)
                outcome = await self._again(slot)
                self.watermark = max(self.watermark, slot.end)
        finally:
            if not slot.is_committed.done():
                slot.is_committed.set_result(False)
            slot.batch.ids_drawn.set()
            slot.release()
        if not slot.replayed:
            return outcome
        slot.first_outcome.extend(outcome)
        return slot.first_outcome

    async def recorded(self, start: int, end: int) -> Outcome:
        """Return the first outcome of rows that are recorded; raises LoadExpired."""
        if self._load is None or start == end:
            return Outcome()
        async with self._database.read() as session:
            outcome = await LoadRepository(session, self._load.caller).outcome(self._load, start, end)
        if len(outcome.ids) < end - start:
            raise expired()
        return outcome

    async def be_certain(self) -> None:
        """Find out whether a commit whose answer was lost is in."""
        if self._load and self._is_uncertain:
            async with self._database.read() as session:
                self.watermark = await LoadRepository(session, self._load.caller).watermark(self._load)
            self._is_uncertain = False

    async def _first_attempt(self, slot: Slot) -> Outcome | None:
        """Write a slot behind the one before it; return None where it is to be tried again on its own."""
        if self._is_uncertain:
            return None
        try:
            outcome = await self._write(slot, slot.previous)
        except (Superseded, *FAULTS):
            return None
        except OutcomeUnknown:
            if self._load is None:
                raise
            self._is_uncertain = True
            return None
        self.watermark = max(self.watermark, slot.end)
        return outcome

    async def _again(self, slot: Slot) -> Outcome:
        """Try a batch on its own, with pauses; raises the last fault."""
        for attempt in range(1, ATTEMPTS):
            await asyncio.sleep(FIRST_PAUSE_SECONDS * attempt * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                await self.be_certain()
                if slot.end <= self.watermark:
                    return await self.recorded(slot.offset + slot.replayed, slot.end)
                return await self._write(slot, None)
            except FAULTS as error:
                if attempt == ATTEMPTS - 1:  # a timeout too is worth another try later
                    raise DatabaseUnavailable(error.message) from error
            except OutcomeUnknown:
                if self._load is None:
                    raise
                self._is_uncertain = True
        raise DatabaseUnavailable("a commit's answer was lost; send the message again to learn its outcome")

    async def _write(self, slot: Slot, previous: Slot | None) -> Outcome:
        """Write the new rows of a slot in a transaction that commits behind the previous one's."""
        if not slot.batch.size:
            await self._require(previous)
            return Outcome()
        if self._options.restores and self._options.writes(slot.batch):
            async with self._database.bulk() as session:
                await BulkWriter(session, self._operation.table).reserve_ids(slot.batch)
        async with self._database.bulk() as session:
            outcome = await self._operation.write(session, slot.batch, self._options)
            await committed(previous)
            await slot.complete(outcome, self._options, self._operation.table.unique)
            if self._load:
                loads = LoadRepository(session, self._load.caller)
                await loads.record(self._load, slot.offset + slot.replayed, outcome)
        return outcome

    async def _require(self, previous: Slot | None) -> None:
        if previous:
            await previous.settled()
            if previous.has_failed():
                raise gap(self.watermark)


def expired() -> LoadExpired:
    """Return the error for a load whose outcomes were dropped."""
    return LoadExpired("the load has expired, its outcomes are gone; use another load_id for new rows")


def gap(expected: int) -> OffsetGap:
    """Return the error for a message that is not the next one."""
    return OffsetGap(
        f"the rows from offset {expected} on are missing; go back there",
        field="offset",
        expected_offset=expected,
    )
