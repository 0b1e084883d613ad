"""One bulk stream: its messages in hand, their order, and which of them may be written side by side."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

from roster.v1.bulk_pb2 import BulkLoad, BulkOptions, BulkWriteResponse
from service.auth.caller import Caller, current_share
from service.bulk.convert import options_effect, options_to_store, summary_to_message
from service.bulk.measured import Measured
from service.bulk.message import MAX_BYTES, MAX_ROWS, BulkMessage
from service.bulk.operation import Operation, StreamOptions
from service.bulk.recorder import Recorder, expired, gap
from service.bulk.slot import REFUSALS, Slot
from service.db.bulk.batch import Outcome
from service.db.engine import Database
from service.errors import (
    InvalidArgument,
    InvalidField,
    InvalidOptions,
    LoadAborted,
    LoadFinished,
    OffsetGap,
    OptionsChanged,
    RosterError,
    TooLarge,
)
from service.loads.repository import COUNTED, Load, LoadRepository, LoadState
from service.loads.rules import check_load_id, check_new_load_id
from service.shares import FairSemaphore
from service.validation import MAX_ID

# Messages read and not yet acknowledged. On two cores three copies at a time made 1.13 of \copy, two
# 1.04, one 0.69.
IN_HAND = 3


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
        self.slots: asyncio.Queue[Slot | None] = asyncio.Queue()
        self.counts = dict.fromkeys(COUNTED, 0)
        self._database = database
        self._operation = operation
        self._caller = caller
        self._measured = Measured(operation)
        self._load = load
        self._recorder = Recorder(database, operation, options.write, load)
        self._room = asyncio.Semaphore(IN_HAND)
        self._has_begun = False
        self._end = 0  # behind the last message, recorded or not
        self._expected = self.watermark  # behind the last batch in hand
        self._last: Slot | None = None
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
            load = await LoadRepository(session, caller.identity).open(
                message.load_id, operation.method, options_to_store(message)
            )
            if load.epoch == 1:  # it begins now; a refusal rolls it back
                check_new_load_id(message.load_id, "options.load_id")
            if load.state == LoadState.EXPIRED:  # it has no options any more
                raise expired()
            first = BulkOptions.FromString(load.options)
            if load.method != operation.method or options_effect(first) != options_effect(message):
                raise OptionsChanged(
                    "the load began with another operation or options; keep those, or use another load_id",
                    field="options",
                )
            if load.state == LoadState.ABORTED:
                raise LoadAborted("the load was aborted; begin another, with another load_id")
        return cls(database, operation, options, caller, load)

    @property
    def watermark(self) -> int:
        """Behind the last row that is recorded."""
        return self._recorder.watermark

    async def receive(self, first: bytes, requests: AsyncIterator[bytes], unwritten: FairSemaphore) -> None:
        """Put a slot in the queue for every message; the caller puts None after the last one.

        `unwritten` counts the bytes of messages that are parsed and not yet written, those of all streams.
        """
        await self._take(first, unwritten)
        del first
        while (received := await anext(requests, None)) is not None:
            await self._take(received, unwritten)
            del received  # the next one may come in minutes

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

    async def _take(self, received: bytes, unwritten: FairSemaphore) -> None:
        await self._room.acquire()
        share, size = current_share(), max(len(received), 1)
        await unwritten.acquire(share, size)
        task = None
        try:
            task = await self._parse(received)
        finally:
            if task:
                task.add_done_callback(lambda _: unwritten.release(share, size))
            else:
                unwritten.release(share, size)

    async def _parse(self, received: bytes) -> "asyncio.Task[Outcome] | None":
        """Queue a message, and return the task that records it, None if there is nothing to record."""
        message = self._operation.parser.parse(received)
        if self._has_begun and message.request.HasField("options"):
            raise InvalidOptions("options come in the first message of a stream only", field="options")
        self._has_begun = True
        if not message.size and not message.request.finish:
            self._room.release()
            return None
        return (await self._queue(message)).task

    async def _queue(self, message: BulkMessage) -> Slot:
        request = message.request
        slot = Slot(request.offset if request.HasField("offset") else self._end, message.size)
        slot.is_last = request.finish
        self._measured.received(slot)
        self._end = min(max(slot.offset, 0), MAX_ID) + slot.size
        try:
            await self._place(slot, is_too_large=message.is_too_large)
        except REFUSALS as error:
            # Its traceback has this frame, which has the message and the slot: a reference cycle.
            slot.refusal = error.with_traceback(None)
        else:
            # Converted once: every access to a repeated field makes its wrappers again.
            await self._start(slot, list(getattr(request, self._operation.rows)))
        self.slots.put_nowait(slot)
        return slot

    async def _place(self, slot: Slot, *, is_too_large: bool) -> None:
        """Find out which rows of a message are new; raises what it is refused with."""
        if self._last and self._last.is_last:
            await self._last.settled()
            if not self._last.has_failed():  # the stream is about to complete the load
                raise _finished()
        if slot.offset < 0:
            raise InvalidField("offset must not be negative", field="offset")
        if is_too_large:
            raise TooLarge(
                f"a message has at most {MAX_ROWS:,} rows and {MAX_BYTES:,} bytes; send these in several",
                field=self._operation.rows,
            )
        if slot.offset != self._expected:
            await self._settle_all()
        if slot.offset > self._expected:
            raise gap(self._expected)
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
        slot.first_outcome = await self._recorder.recorded(slot.offset, slot.offset + slot.replayed)

    async def _settle_all(self) -> None:
        if self._last:
            await self._last.settled()
        await self._recorder.be_certain()
        self._last = None
        self._expected = self.watermark

    async def _start(self, slot: Slot, messages: list[Any]) -> None:
        await asyncio.sleep(0)  # a message of 4 MiB took 20 ms so far
        slot.batch = await self._operation.batch(messages[slot.replayed :], self.options.write)
        if any(slot.batch.columns.get("hashed_password", ())):
            self._caller.require("loader", "hashed_password")
        slot.batch.expects_conflicts = self._meets_conflicts
        await self._clear(slot)
        slot.previous, self._last = self._last, slot
        slot.batch.draws_after = slot.previous.batch.has_drawn if slot.previous else None
        self._expected = max(self._expected, slot.end)
        slot.task = asyncio.create_task(self._recorder.record(slot))

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


def _finished() -> LoadFinished:
    return LoadFinished("the load is finished; begin another for new rows, with another load_id")
