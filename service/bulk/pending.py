"""PendingBatch: a message of a bulk stream from its receipt to its acknowledgement."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from time import perf_counter

from roster.errors import (
    InvalidField,
    OffsetGap,
    ResourceExhausted,
    RosterError,
    StatementTimeout,
    TooLarge,
    Unavailable,
)
from service.db.base import KeyValue
from service.db.bulk.batch import Batch, OnConflict, Outcome, Result, WriteOptions
from service.db.bulk.table import UniqueKey
from service.timeslice import slices

# Failures of the database, after which a batch is tried again.
FAULTS = (Unavailable, ResourceExhausted, StatementTimeout)
# Errors that refuse one message, of which nothing is recorded. The stream stays open.
REFUSALS = (InvalidField, TooLarge, OffsetGap, *FAULTS)


class BatchState(Enum):
    """The state of a pending batch; pipeline.py has the diagram."""

    RECEIVED = auto()
    WRITING = auto()  # its first attempt, maybe at the same time as other batches
    RETRYING = auto()  # alone, after the batch before it
    COMMITTED = auto()
    REFUSED = auto()  # nothing of it is recorded


# While a batch waits here for the commit of the one before, that one may wait in the database for a third
# transaction, which waits for a lock of this batch: a deadlock that the database can't see. So this batch
# rolls back, and is tried again after the one before. The time is longer than the database's own
# deadlock_timeout, and shorter than the lock_timeout, which would fail one of the three.
MAX_WAIT_SECONDS = 2.0


class PreviousNotCommitted(Exception):
    """The batch before has failed, or takes long, so this one can't commit either."""


@dataclass(eq=False)
class PendingBatch:
    """A message that is not acknowledged yet. Its rows from `replayed` on are new."""

    offset: int
    size: int
    has_finish: bool = False
    state: BatchState = BatchState.RECEIVED
    received_at: float = field(default_factory=perf_counter)
    previous: "PendingBatch | None" = None  # the batch that has to commit before this one
    replayed: int = 0
    replayed_outcome: Outcome = field(default_factory=Outcome)  # of the rows that were committed before
    batch: Batch = field(default_factory=lambda: Batch(0))  # the new rows
    outcome: Outcome = field(default_factory=Outcome)  # of the new rows, once they are written
    # For the id and each unique key: value -> the first good row that has it.
    keys: Mapping[str, Mapping[KeyValue, int]] = field(default_factory=dict)
    # Row -> the earlier batch that has its unique key, and the row of that batch.
    deferred: "dict[int, tuple[PendingBatch, int]]" = field(default_factory=dict)
    task: "asyncio.Task[Outcome] | None" = None  # commits the batch
    refusal: RosterError | None = None  # why there is no task
    attempted: asyncio.Event = field(default_factory=asyncio.Event)  # the first attempt is over

    @property
    def end(self) -> int:
        """The offset after its last row."""
        return self.offset + self.size

    @property
    def is_settled(self) -> bool:
        """Whether it is committed, or will not be."""
        return self.task is None or self.task.done()

    @property
    def is_committed(self) -> bool:
        """Whether its rows are durable."""
        return self.state is BatchState.COMMITTED

    def move_to(self, state: BatchState) -> None:
        """Change the state, and wake the next batch once the first attempt is over."""
        self.state = state
        if state is not BatchState.WRITING:
            self.attempted.set()
            # The next batch may wait for this one to draw ids or to lock rows. If it has not done so in its
            # first attempt, it need not, or the next batch rolls back anyway.
            self.batch.next_turn.set()

    async def settle(self) -> None:
        """Wait until the batch is committed, or will not be."""
        if self.task:
            await asyncio.wait([self.task])

    async def wait_for_previous(self) -> None:
        """Wait for the commit of the batch before.

        Raises PreviousNotCommitted if that has failed, or takes longer than MAX_WAIT_SECONDS.
        """
        if self.previous is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self.previous.attempted.wait()
        if not self.previous.is_committed:
            raise PreviousNotCommitted

    async def result(self) -> Outcome | RosterError:
        """Wait for the outcome, or the error that refuses the message; raises errors that end the stream."""
        if self.task is None:
            if self.refusal is None:
                raise RuntimeError("a pending batch has a task or a refusal")
            return self.refusal
        try:
            return await self.task
        except REFUSALS as error:
            return error.with_traceback(None)

    def overlaps(self, other: "PendingBatch") -> bool:
        """Return whether the two batches have a key in common."""
        return any(
            not values.keys().isdisjoint(other.keys.get(name, ())) for name, values in self.keys.items()
        )

    def defer(self, other: "PendingBatch", key: UniqueKey) -> None:
        """Leave out the rows whose key an earlier batch has, until that batch is written."""
        values, rows_of_other = self.batch.columns[key.name], other.keys[key.name]
        common = self.keys[key.name].keys() & rows_of_other.keys()
        for row in [row for row in self.batch.good_rows() if values[row] in common]:
            self.deferred[row] = other, rows_of_other[values[row]]
        # A view: the batch leaves out all rows that are in `deferred`, those of later calls too.
        self.batch.deferred = self.deferred.keys()

    async def complete(self, outcome: Outcome, options: WriteOptions, unique: Sequence[UniqueKey]) -> None:
        """Keep the outcome, with the results of deferred rows added: the earlier batches are written."""
        self.outcome = outcome
        if not self.deferred:
            return
        (key,) = unique  # otherwise no rows are deferred
        results = bytearray(outcome.results)
        async for some in slices(list(self.deferred.items())):
            for row, (other, row_of_other) in some:
                id = other.outcome.id_of(row_of_other)
                if options.on_conflict is OnConflict.SKIP:
                    results[row], outcome.ids[row] = Result.SKIPPED, id
                else:
                    outcome.failures[row] = key.conflict_error(id)
        outcome.results = bytes(results)

    def release(self) -> None:
        """Drop the rows and the links to other batches: a client may never read the acknowledgement."""
        self.previous = None
        self.deferred = {}
        # The next batch may still wait for this one.
        self.batch = Batch(0, next_turn=self.batch.next_turn)
