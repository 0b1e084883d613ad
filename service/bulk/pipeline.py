"""Pipeline: the pending batches of one bulk stream, their order, and which may be written together."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import perf_counter

from google.protobuf.message import Message

from roster.errors import (
    InvalidArgument,
    InvalidField,
    InvalidOptions,
    LoadFinished,
    OffsetGap,
    RosterError,
    TooLarge,
)
from service.auth.caller import Caller, current_share
from service.bulk.committer import BatchCommitter, gap
from service.bulk.message import MAX_BYTES, MAX_ROWS, BulkMessage
from service.bulk.offsets import Gap, New, Offsets, Replay, Straddle
from service.bulk.operation import Operation, StreamOptions
from service.bulk.pending import REFUSALS, BatchState, PendingBatch
from service.db.bulk.batch import Outcome, Result
from service.loads.model import COUNTED, Load, LoadState
from service.metrics import BULK_BATCH, BULK_BATCH_ROWS, BULK_LAG, BULK_REFUSED, BULK_ROWS
from service.shares import FairSemaphore
from service.validation import MAX_ID

# A message is a batch, a transaction, and an acknowledgement. The life of a batch:
#
#                         parse, place, convert            write rows, wait for the
#                                                          commit of the batch before
#     message ──> RECEIVED ───────────────────> WRITING ──────────────────────────> COMMITTED ──> ack
#                    │                            │ fault, or the batch before        ▲
#                    │ negative offset, gap,      │ did not commit within 2 s         │
#                    │ too large, fault           ▼                                   │
#                    │                         RETRYING ──────────────────────────────┤
#                    │                            │ alone, up to twice                │
#                    │                            │ gap, or the last fault      the watermark says
#                    ▼                            ▼                             it was committed
#                 REFUSED <───────────────────────┘
#                    └──> ack with an error: nothing of the message is recorded
#
# `receive` runs in a task of its own and does the part up to WRITING, for one message after the other, so
# that batches ask for connections in order. `BatchCommitter.commit` is a task per batch. The stream waits for
# the batches in the order of their messages, and sends their acknowledgements.
#
# Two limits keep memory from growing with the load. A stream has at most MAX_PENDING messages that are not
# acknowledged. All streams together have a budget of bytes for messages that are not written. A message
# that exceeds either is left in gRPC's buffers, which slows the client down.

# Messages read and not yet acknowledged. On two cores, three batches at a time reached 1.13 of the rate of
# \copy, two 1.04, one 0.69.
MAX_PENDING = 3


class Pipeline:
    """The pending batches of one stream, in the order of their offsets."""

    def __init__(
        self,
        operation: Operation,
        options: StreamOptions,
        caller: Caller,
        load: Load | None,
        committer: BatchCommitter,
    ) -> None:
        self.pending: asyncio.Queue[PendingBatch | None] = asyncio.Queue()  # None is the end
        self.counts = dict.fromkeys(COUNTED, 0)
        self._operation = operation
        self._options = options
        self._caller = caller
        self._load = load
        self._committer = committer
        self._offsets = Offsets(committer.watermark, MAX_ID)
        self._room = asyncio.Semaphore(MAX_PENDING)
        self._has_begun = False
        self._last: PendingBatch | None = None  # the last batch that was started
        self._meets_conflicts = False
        self._new_failures = 0
        self._metric_label = operation.method.rpartition(".")[2]
        self._uncommitted_rows = 0

    async def receive(self, first: bytes, requests: AsyncIterator[bytes], unwritten: FairSemaphore) -> None:
        """Put a pending batch in the queue for every message. The caller puts None after the last one.

        `unwritten` limits the bytes of all streams' messages that are parsed and not yet written.
        """
        await self._receive(first, unwritten)
        del first
        while (received := await anext(requests, None)) is not None:
            await self._receive(received, unwritten)
            del received  # the next message may come minutes later

    def refuse(self, pending: PendingBatch, error: RosterError) -> None:
        """Count a message that is answered with an error, and make room for another."""
        self._room.release()
        self._add_lag(-pending.size)
        BULK_REFUSED.labels(self._metric_label, error.reason).inc()

    def acknowledge(self, pending: PendingBatch, outcome: Outcome) -> None:
        """Count the results of a message that is answered, and make room for another."""
        self._room.release()
        new = outcome.part(pending.replayed, pending.size) if pending.replayed else outcome
        self._measure(pending, new)
        self._new_failures += new.failed
        for name in COUNTED:
            self.counts[name] += getattr(new, name)
        # Rows that break a rule fail without a look-up. All others were in conflict with stored rows, so
        # that the next batches are likely to be, too.
        if new.skipped or not all(isinstance(error, InvalidArgument) for error in new.failures.values()):
            self._meets_conflicts = True

    def has_too_many_failures(self) -> bool:
        """Return whether more rows have failed in this stream than `max_failures` allows."""
        return 0 < self._options.max_failures < self._new_failures

    async def close(self, receiver: "asyncio.Task[None]") -> None:
        """Cancel the pending batches; a commit that has begun is completed."""
        tasks: list[asyncio.Task[None] | asyncio.Task[Outcome]] = [receiver]
        while not self.pending.empty():
            pending = self.pending.get_nowait()
            if pending and pending.task:
                tasks.append(pending.task)
        for task in tasks:
            task.cancel()
        self._add_lag(-self._uncommitted_rows)
        await asyncio.gather(*tasks, return_exceptions=True)  # the last await: it may be cancelled too

    async def _receive(self, received: bytes, unwritten: FairSemaphore) -> None:
        # Wait for room in the stream, then for the bytes of all streams. Callers take turns there.
        await self._room.acquire()
        share, size = current_share(), max(len(received), 1)
        await unwritten.acquire(share, size)
        task = None
        try:
            task = await self._enqueue(self._parse(received))
        finally:
            # The bytes are given back once the batch is written, or at once if nothing is to be written.
            if task:
                task.add_done_callback(lambda _: unwritten.release(share, size))
            else:
                unwritten.release(share, size)

    def _parse(self, received: bytes) -> BulkMessage:
        message = self._operation.parser.parse(received)
        if self._has_begun and message.request.HasField("options"):
            raise InvalidOptions("only the first message of a stream may have options", field="options")
        self._has_begun = True
        return message

    async def _enqueue(self, message: BulkMessage) -> "asyncio.Task[Outcome] | None":
        """Queue a message; return the task that commits it, None if it has none."""
        request = message.request
        if not message.size and not request.finish:  # an empty message, or one with options only
            self._room.release()
            return None
        given = request.offset if request.HasField("offset") else None
        offset = self._offsets.of_message(given, message.size)
        pending = PendingBatch(offset, message.size, has_finish=request.finish)
        self._add_lag(pending.size)
        try:
            await self._place(pending, is_too_large=message.is_too_large)
        except REFUSALS as error:
            # The traceback refers to this frame, which refers to the message and to the batch: a cycle.
            pending.refusal = error.with_traceback(None)
            pending.move_to(BatchState.REFUSED)
        else:
            # Convert the field to a list once: every access to it creates wrappers of its messages.
            await self._start(pending, list(getattr(request, self._operation.rows_field)))
        self.pending.put_nowait(pending)
        return pending.task

    async def _place(self, pending: PendingBatch, *, is_too_large: bool) -> None:
        """Find out which rows of a message are new; raises the error that refuses it."""
        # After `finish` nothing may follow, unless that message was refused.
        if self._last and self._last.has_finish:
            await self._last.settle()
            if self._last.is_committed:
                raise _finished()
        if pending.offset < 0:
            raise InvalidField("offset must not be negative", field="offset")
        if is_too_large:
            raise TooLarge(
                f"a message may have at most {MAX_ROWS:,} rows and {MAX_BYTES:,} bytes; split it",
                field=self._operation.rows_field,
            )
        pending.replayed = await self._count_replayed(pending)
        has_new_rows = pending.replayed < pending.size
        if has_new_rows and self._load and self._load.state == LoadState.FINISHED:
            raise _finished()
        # Read here and not in the batch's task: batches have to ask for their connections in order.
        replayed_end = pending.offset + pending.replayed
        pending.replayed_outcome = await self._committer.replay(pending.offset, replayed_end)

    async def _count_replayed(self, pending: PendingBatch) -> int:
        """Return how many rows of a message are committed already; raises OffsetGap."""
        placement = self._offsets.place(pending.offset, pending.size)
        if isinstance(placement, New):
            return 0
        # Pending batches may still fail. Once they are settled, the watermark decides.
        await self._settle_all()
        placement = self._offsets.place(pending.offset, pending.size)
        match placement:
            case New():
                return 0
            case Gap(expected):
                raise gap(expected)
            case _ if self._load is None:
                raise self._not_replayable()
            case Straddle(replayed):
                return replayed
            case Replay():
                return pending.size

    async def _settle_all(self) -> None:
        """Wait for all pending batches, and go on at the watermark."""
        if self._last:
            await self._last.settle()
        await self._committer.resolve_uncertainty()
        self._last = None
        self._offsets.return_to(self._committer.watermark)

    async def _start(self, pending: PendingBatch, messages: Sequence[Message]) -> None:
        """Convert the new rows of a message and start the task that commits them."""
        await asyncio.sleep(0)  # parsing 4 MiB has just taken 20 ms
        # Convert the rows to columns, and check the caller's rights to set some of them.
        pending.batch = await self._operation.batch(messages[pending.replayed :], self._options.write)
        for name, role in self._operation.required_roles.items():
            if any(pending.batch.columns.get(name, ())):
                self._caller.require(role, name)
        pending.batch.expects_conflicts = self._meets_conflicts
        # Wait for batches that this one depends on.
        pending.keys = pending.batch.keys(self._operation.key_names)
        await self._wait_for_dependencies(pending)
        # From here on its place in the order is fixed: it commits, and takes its turn, after `previous`.
        pending.previous, self._last = self._last, pending
        if pending.previous:
            pending.batch.turn = pending.previous.batch.next_turn
        self._offsets.accept(pending.end)
        pending.task = asyncio.create_task(self._committer.commit(pending))

    async def _wait_for_dependencies(self, pending: PendingBatch) -> None:
        """Wait for the pending batches that can't be written at the same time as the new one.

        If it were the first of two batches to insert a key that both have, the earlier batch would wait for
        it in the database, and it would wait for the commit of the earlier batch here: a deadlock that the
        database can't see. So a batch either waits before it is written, or leaves out the rows in question.
        """
        is_parallel = self._operation.is_parallel(self._options.write)
        can_defer = self._operation.can_defer(self._options.write)
        other = self._last
        while other and not other.is_settled:
            overlaps = pending.overlaps(other) or self._operation.may_overlap(pending.keys, other.keys)
            must_wait = not is_parallel or other.state is BatchState.RETRYING
            if must_wait or (overlaps and not can_defer):
                await other.settle()
                return  # the batches before that one are settled too
            if overlaps:
                pending.defer(other, self._operation.table.unique[0])
            other = other.previous

    def _not_replayable(self) -> OffsetGap:
        expected = self._offsets.expected
        return OffsetGap(
            "rows at this offset are committed, and a load without load_id keeps no outcomes; "
            f"go on at offset {expected}",
            field="offset",
            expected_offset=expected,
        )

    def _measure(self, pending: PendingBatch, new: Outcome) -> None:
        self._add_lag(-pending.size)
        BULK_BATCH_ROWS.labels(self._metric_label).observe(pending.size)
        BULK_BATCH.labels(self._metric_label).observe(perf_counter() - pending.received_at)
        counts = {result.name.lower(): new.results.count(result) for result in Result}
        counts["replayed"] = pending.replayed
        for result, rows in counts.items():
            BULK_ROWS.labels(self._metric_label, result).inc(rows)

    def _add_lag(self, rows: int) -> None:
        self._uncommitted_rows += rows
        BULK_LAG.inc(rows)


def _finished() -> LoadFinished:
    return LoadFinished("the load is finished; use another load_id for new rows")
