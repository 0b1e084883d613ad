"""One bulk stream: its batches in hand, their order, and what happens when one fails.

Batches are copied at the same time, each in a transaction of its own, and committed in the order of
their offsets: each waits for the one before it. When one fails, those behind it roll back; then they
are tried again one at a time.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, Self

from roster.v1.bulk_pb2 import BulkLoad, BulkOptions, BulkWriteResponse
from service.bulk.convert import summary_to_message
from service.bulk.measured import Measured
from service.bulk.operation import Operation, StreamOptions
from service.bulk.slot import Slot, Superseded, committed
from service.caller import Caller
from service.db.base import MAX_ID
from service.db.bulk.batch import Outcome
from service.db.bulk.loads import COUNTED, Load, LoadRepository, LoadState
from service.db.bulk.writer import BulkWriter
from service.db.engine import Database
from service.errors import (
    DatabaseUnavailable,
    InvalidArgument,
    InvalidField,
    InvalidOptions,
    LoadAborted,
    LoadExpired,
    LoadFinished,
    OffsetGap,
    OptionsChanged,
    OutcomeUnknown,
    RosterError,
    StatementTimeout,
    TooLarge,
    Unavailable,
)
from service.fields import check_load_id

MAX_ROWS = 5000
MAX_BYTES = 4 << 20
# Messages read and not yet acknowledged. On two cores three copies at a time made 1.13 of \copy, two
# 1.04, one 0.69.
IN_HAND = 3
ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 0.1

FAULTS = (Unavailable, StatementTimeout)
# What a message is answered with when nothing of it is recorded; the stream stays open.
REFUSALS = (InvalidField, TooLarge, OffsetGap, *FAULTS)


class Stream:
    """The batches of one stream, in the order of their offsets."""

    def __init__(
        self,
        database: Database,
        operation: Operation,
        options: StreamOptions,
        caller: Caller,
        load: Load | None,
    ) -> None:
        self.options = options
        self.watermark = load.next_offset if load else 0  # behind the last row that is recorded
        self.slots: asyncio.Queue[Slot | None] = asyncio.Queue()
        self.counts = dict.fromkeys(COUNTED, 0)
        self._database = database
        self._operation = operation
        self._caller = caller
        self._measured = Measured(operation)
        self._load = load
        self._room = asyncio.Semaphore(IN_HAND)
        self._end = 0  # behind the last message, recorded or not
        self._expected = self.watermark  # behind the last batch in hand
        self._last: Slot | None = None
        self._is_uncertain = False  # a commit's answer was lost
        self._meets_conflicts = False
        self._new_failures = 0

    @classmethod
    async def open(
        cls, database: Database, operation: Operation, message: BulkOptions, caller: Caller
    ) -> Self:
        """Begin a stream; one of a named load goes on with it, and fences older streams off."""
        options = StreamOptions.from_message(message, operation)
        if message.restore:
            caller.require("admin", "restore")
        if message.load_id:
            check_load_id(message.load_id, "options.load_id")
        if not message.load_id or message.validate_only:
            return cls(database, operation, options, caller, None)
        async with database.begin() as session:
            kept = message.SerializeToString(deterministic=True)
            load = await LoadRepository(session, caller.identity).open(
                message.load_id, operation.method, kept
            )
            first = BulkOptions.FromString(load.options)
            if load.method != operation.method or _effect(first) != _effect(message):
                raise OptionsChanged(
                    "the load began with another operation or options; keep those, or use another load_id",
                    field="options",
                )
            if load.state == LoadState.ABORTED:
                raise LoadAborted("the load was aborted; begin another, with another load_id")
            if load.state == LoadState.EXPIRED:
                raise _expired()
        return cls(database, operation, options, caller, load)

    async def receive(self, first: Any, requests: AsyncIterator[Any]) -> None:
        """Put a slot in the queue for every message; the caller puts None behind the last one."""
        await self._take(first)
        async for request in requests:
            if request.HasField("options"):
                raise InvalidOptions("options come in the first message of a stream only", field="options")
            await self._take(request)

    def refused(self, slot: Slot, error: RosterError) -> None:
        """Count a message that was refused, and make room for another."""
        self._room.release()
        self._measured.refused(slot, error)

    def acknowledged(self, slot: Slot, outcome: Outcome) -> None:
        """Count what became of a message that was recorded, and make room for another."""
        self._room.release()
        new = outcome.part(slot.replayed, slot.size) if slot.replayed else outcome
        self._measured.recorded(slot, new)
        self._new_failures += new.failed
        for name in COUNTED:
            self.counts[name] += getattr(new, name)
        # Rows that break a rule are found without asking; all others met something that is stored.
        if new.skipped or not all(isinstance(error, InvalidArgument) for error in new.failures.values()):
            self._meets_conflicts = True

    def has_failed_too_often(self) -> bool:
        """Tell whether more rows failed in this stream than the caller wants to see."""
        return 0 < self.options.max_failures < self._new_failures

    async def finish(self) -> None:
        """Complete the load; raises LoadFenced where another stream has it."""
        if self._load and self._load.state == LoadState.OPEN:
            async with self._database.begin() as session:
                await LoadRepository(session, self._caller.identity).finish(self._load)

    async def summary(self, *, is_finished: bool) -> BulkWriteResponse:
        """Return the last event; of a named load it has the numbers of all its streams."""
        if self._load is None:
            state = BulkLoad.FINISHED if is_finished else BulkLoad.STATE_UNSPECIFIED
            return summary_to_message(self.watermark, self.counts, state)
        async with self._database.read() as session:
            load = await LoadRepository(session, self._caller.identity).get(self._load.load_id)
        counts = {name: getattr(load, name) for name in COUNTED}
        return summary_to_message(load.next_offset, counts, BulkLoad.State.ValueType(load.state))

    async def close(self, receiver: "asyncio.Task[None]") -> None:
        """Give up what is in hand; a commit that has begun is finished."""
        tasks: list[asyncio.Task[Any]] = [receiver]
        while not self.slots.empty():
            slot = self.slots.get_nowait()
            if slot and slot.task:
                tasks.append(slot.task)
        for task in tasks:
            task.cancel()
        self._measured.closed()
        await asyncio.gather(*tasks, return_exceptions=True)  # the last await: it can be cancelled too

    async def _take(self, request: Any) -> None:
        rows = getattr(request, self._operation.rows)
        if not rows and not request.finish:
            return
        await self._room.acquire()
        slot = Slot(request.offset if request.HasField("offset") else self._end, len(rows))
        slot.is_last = request.finish
        self._measured.received(slot)
        self._end = min(max(slot.offset, 0), MAX_ID) + slot.size
        try:
            await self._place(slot, request.ByteSize())
        except REFUSALS as error:
            slot.refusal = error
        else:
            # Once, as each look at a repeated field makes its wrappers anew, and of no message that is too
            # large: to make 8 million wrappers takes 1.5 GiB.
            await self._start(slot, list(rows))
        self.slots.put_nowait(slot)

    async def _place(self, slot: Slot, size: int) -> None:
        """Find out which rows of a message are new; raises what it is refused with."""
        if self._last and self._last.is_last:
            await self._last.settled()
            if not self._last.has_failed():  # the stream is about to complete the load
                raise _finished()
        if slot.offset < 0:
            raise InvalidField("offset must not be negative", field="offset")
        if slot.size > MAX_ROWS or size > MAX_BYTES:
            raise TooLarge(
                f"a message has at most {MAX_ROWS:,} rows and {MAX_BYTES:,} bytes; send these in several",
                field=self._operation.rows,
            )
        if slot.offset != self._expected:
            await self._settle_all()
        if slot.offset > self._expected:
            raise _gap(self._expected)
        if slot.offset < self._expected and self._load is None:
            raise OffsetGap(
                "this offset is recorded already, and a load without load_id keeps no outcomes; "
                f"go on at {self._expected}",
                field="offset",
                expected_offset=self._expected,
            )
        slot.replayed = min(slot.size, self._expected - slot.offset)
        if slot.replayed < slot.size and self._load and self._load.state == LoadState.FINISHED:
            raise _finished()
        # Not in the slot's task: batches have to ask for their connections in order.
        slot.first_outcome = await self._recorded(slot.offset, slot.offset + slot.replayed)

    async def _settle_all(self) -> None:
        if self._last:
            await self._last.settled()
        if self._is_uncertain:
            await self._look_again()
        self._last = None
        self._expected = self.watermark

    async def _start(self, slot: Slot, messages: list[Any]) -> None:
        slot.batch = self._operation.batch(messages[slot.replayed :], self.options.write)
        if any(slot.batch.columns.get("hashed_password", ())):
            self._caller.require("loader", "hashed_password")
        slot.batch.expects_conflicts = self._meets_conflicts
        await self._clear(slot)
        slot.previous, self._last = self._last, slot
        slot.batch.draws_after = slot.previous.batch.has_drawn if slot.previous else None
        self._expected = max(self._expected, slot.end)
        slot.task = asyncio.create_task(self._settled(slot))

    async def _clear(self, slot: Slot) -> None:
        """Wait for the batches in hand that the new one can't be written beside."""
        slot.keys = slot.batch.keys()
        is_parallel = self._operation.is_parallel(self.options.write)
        can_defer = self._operation.can_defer(self.options.write)
        other = self._last
        while other and not other.is_settled():
            meets = slot.meets(other)
            if not is_parallel or other.is_in_trouble() or (meets and not can_defer):
                await other.settled()
                return
            if meets:
                slot.wait_for(other)
            other = other.previous

    async def _settled(self, slot: Slot) -> Outcome:
        """Record a message; raises one of REFUSALS where it can't be, and anything else to end the stream."""
        try:
            outcome = await self._first_attempt(slot)
            slot.batch.has_drawn.set()
            slot.is_committed.set_result(outcome is not None)
            if outcome is None:
                await self._require(slot.previous)
                outcome = await self._again(slot)
                self.watermark = max(self.watermark, slot.end)
        finally:
            if not slot.is_committed.done():
                slot.is_committed.set_result(False)
            slot.batch.has_drawn.set()
            slot.previous = None
            slot.awaited.clear()  # its batch looks at it too
        if not slot.replayed:
            return outcome
        slot.first_outcome.extend(outcome)
        return slot.first_outcome

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

    async def _require(self, previous: Slot | None) -> None:
        if previous:
            await previous.settled()
            if previous.has_failed():
                raise _gap(self.watermark)

    async def _again(self, slot: Slot) -> Outcome:
        """Try a batch on its own, with pauses; raises the last fault."""
        for attempt in range(1, ATTEMPTS):
            await asyncio.sleep(FIRST_PAUSE_SECONDS * attempt * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                if self._is_uncertain:
                    await self._look_again()
                if slot.end <= self.watermark:
                    return await self._recorded(slot.offset + slot.replayed, slot.end)
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
        if self.options.write.restores and self.options.write.writes(slot.batch):
            async with self._database.bulk() as session:
                await BulkWriter(session, self._operation.model).reserve(slot.batch)
        async with self._database.bulk() as session:
            outcome = await self._operation.write(session, slot.batch, self.options.write)
            await committed(previous)
            if self._operation.taken:
                slot.complete(outcome, self.options.write, self._operation.taken)
            if self._load:
                await LoadRepository(session, self._caller.identity).record(
                    self._load, slot.offset + slot.replayed, outcome
                )
        return outcome

    async def _look_again(self) -> None:
        """Find out whether a commit whose answer was lost is in."""
        if self._load is None:
            raise RuntimeError("only a named load can be looked at again")
        async with self._database.read() as session:
            self.watermark = await LoadRepository(session, self._caller.identity).watermark(self._load)
        self._is_uncertain = False

    async def _recorded(self, start: int, end: int) -> Outcome:
        if self._load is None or start == end:
            return Outcome()
        async with self._database.read() as session:
            outcome = await LoadRepository(session, self._caller.identity).outcome(self._load, start, end)
        if len(outcome.ids) < end - start:
            raise _expired()
        return outcome


def _effect(options: BulkOptions) -> BulkOptions:
    """Return what of the options decides what is written; the rest may change from stream to stream."""
    effect = BulkOptions()
    effect.CopyFrom(options)
    for field_name in ("return_ids", "max_failures"):
        effect.ClearField(field_name)
    return effect


def _expired() -> LoadExpired:
    return LoadExpired("the load has expired, its outcomes are gone; use another load_id for new rows")


def _finished() -> LoadFinished:
    return LoadFinished("the load is finished; begin another for new rows, with another load_id")


def _gap(expected: int) -> OffsetGap:
    return OffsetGap(
        f"the rows from offset {expected} on are missing; go back there",
        field="offset",
        expected_offset=expected,
    )
