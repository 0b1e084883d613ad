"""A message that a stream has in hand."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from service.db.bulk.batch import Batch, OnConflict, Outcome, Result, WriteOptions
from service.db.bulk.table import UniqueKey
from service.errors import (
    InvalidField,
    OffsetGap,
    ResourceExhausted,
    RosterError,
    StatementTimeout,
    TooLarge,
    Unavailable,
)
from service.timeslice import slices

# Of the database; the message is tried again.
FAULTS = (Unavailable, ResourceExhausted, StatementTimeout)
# What a message is answered with when nothing of it is recorded; the stream stays open.
REFUSALS = (InvalidField, TooLarge, OffsetGap, *FAULTS)


class Superseded(Exception):
    """The batch before this one did not commit at its first attempt."""


@dataclass(eq=False)
class Slot:
    """A message in hand. Its rows from `replayed` on are new."""

    offset: int
    size: int
    previous: "Slot | None" = None
    batch: Batch = field(default_factory=lambda: Batch(0))
    # For the id and each unique key: value -> the first good row that has it.
    keys: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)
    awaited: "dict[int, tuple[Slot, int]]" = field(
        default_factory=dict
    )  # row -> the earlier one with its key
    written: Outcome = field(default_factory=Outcome)  # of the new rows, not yet committed
    replayed: int = 0
    received_at: float = field(default_factory=perf_counter)
    first_outcome: Outcome = field(default_factory=Outcome)  # of the rows that were recorded before
    is_last: bool = False  # the message had `finish`
    refusal: RosterError | None = None  # why it was never tried
    is_committed: asyncio.Future[bool] = field(default_factory=asyncio.Future)  # by its first attempt
    task: "asyncio.Task[Outcome] | None" = None

    @property
    def end(self) -> int:
        return self.offset + self.size

    def meets(self, other: "Slot") -> bool:
        """Tell whether the two have a key in common."""
        return any(
            not values.keys().isdisjoint(other.keys.get(name, ())) for name, values in self.keys.items()
        )

    def wait_for(self, other: "Slot", key: UniqueKey) -> None:
        """Leave the rows whose key an earlier slot has to `complete`; the others need not wait."""
        values, rows_of = self.batch.columns[key.name], other.keys.get(key.name, {})
        for row in self.batch.good_rows():
            there = rows_of.get(values[row])
            if there is not None:
                self.awaited[row] = other, there
        self.batch.deferred = self.awaited.keys()

    async def complete(self, outcome: Outcome, options: WriteOptions, unique: Sequence[UniqueKey]) -> None:
        """Add what became of the rows whose keys are an earlier slot's, by now written."""
        self.written = outcome
        if not self.awaited:
            return
        (key,) = unique  # rows are deferred only if there is one
        results = bytearray(outcome.results)
        async for some in slices(list(self.awaited.items())):
            for row, (other, there) in some:
                id = other.written.id_of(there)
                if options.on_conflict is OnConflict.SKIP:
                    results[row], outcome.ids[row] = Result.SKIPPED, id
                else:
                    outcome.failures[row] = key.conflict_error(id)
        outcome.results = bytes(results)

    async def outcome(self) -> Outcome | RosterError:
        """Wait for what becomes of the message, or why it is refused; raises what ends the stream."""
        if self.task is None:
            if self.refusal is None:
                raise RuntimeError("a message is refused or tried")
            return self.refusal
        try:
            return await self.task
        except REFUSALS as error:
            return error.with_traceback(None)

    def release(self) -> None:
        """Drop the rows, once they are written or will not be: a client may never read the ack."""
        self.previous = None
        self.awaited.clear()  # its batch looks at it too
        self.batch = Batch(0, ids_drawn=self.batch.ids_drawn)  # the next slot waits for it

    async def settled(self) -> None:
        """Wait until the message is recorded, or will not be."""
        if self.task:
            await asyncio.wait([self.task])

    def is_settled(self) -> bool:
        return self.task is None or self.task.done()

    def has_failed(self) -> bool:
        """Tell whether a settled message was not recorded."""
        return self.task is None or self.task.cancelled() or self.task.exception() is not None

    def is_in_trouble(self) -> bool:
        """Tell whether the message is being tried again."""
        return not self.is_settled() and self.is_committed.done() and not self.is_committed.result()


async def committed(previous: Slot | None) -> None:
    """Wait for the commit of the slot before, so that commits come in order; or raise Superseded."""
    if previous is None:
        return
    if previous.is_settled():
        has_committed = not previous.has_failed()
    else:
        has_committed = await asyncio.shield(previous.is_committed)
    if not has_committed:
        raise Superseded
