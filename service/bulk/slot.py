"""A message that a stream has in hand."""

import asyncio
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from service.db.bulk.batch import Batch, Outcome
from service.errors import RosterError


class Superseded(Exception):
    """The batch before this one did not commit at its first attempt."""


@dataclass(eq=False)
class Slot:
    """A message in hand. Its rows from `replayed` on are new."""

    offset: int
    size: int
    previous: "Slot | None" = None
    batch: Batch = field(default_factory=lambda: Batch(0))
    keys: AbstractSet[Any] = frozenset()  # what other batches must not touch at the same time
    replayed: int = 0
    first_outcome: Outcome = field(default_factory=Outcome)  # of the rows that were recorded before
    is_last: bool = False  # the message had `finish`
    refusal: RosterError | None = None  # why it was never tried
    is_committed: asyncio.Future[bool] = field(default_factory=asyncio.Future)  # by its first attempt
    task: "asyncio.Task[Outcome] | None" = None

    @property
    def end(self) -> int:
        return self.offset + self.size

    async def outcome(self) -> Outcome:
        """Wait for what becomes of the message; raises one of REFUSALS, or what ends the stream."""
        if self.task is None:
            raise self.refusal or RuntimeError("a message is refused or tried")
        return await self.task

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
