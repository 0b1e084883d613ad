"""Time slices: long work lets the event loop run other callbacks between its steps."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar

from service.wire import Fields

# Short enough not to be noticed; long enough that switching costs a batch less than 1 %.
SLICE_SECONDS = 0.004
STEP = 100  # items; each takes a few microseconds

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class TimeSlice:
    """Limits how long a task holds the event loop: call `pause` between steps of a few milliseconds each."""

    def __init__(self) -> None:
        self._end = perf_counter() + SLICE_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether the time slice is used up."""
        return perf_counter() >= self._end

    async def pause(self) -> None:
        """Let other callbacks run if the time slice is used up."""
        if self.is_over:
            await asyncio.sleep(0)
            self._end = perf_counter() + SLICE_SECONDS


async def slices(items: Sequence[ItemT], step: int = STEP) -> AsyncIterator[Sequence[ItemT]]:
    """Yield the items, `step` at a time; other callbacks run in between when a time slice is used up."""
    time_slice = TimeSlice()
    for start in range(0, len(items), step):
        yield items[start : start + step]
        await time_slice.pause()


async def map_in_slices(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], step: int = STEP
) -> list[ResultT]:
    """Return the results of the function in the order of the items; a time slice limits each step."""
    found: list[ResultT] = []
    async for some in slices(items, step):
        found += map(function, some)
    return found


async def add_in_slices(messages: Any, fields_of: Callable[[ItemT], Fields], items: Sequence[ItemT]) -> None:
    """Add a message for each item to a repeated field, in place: copying messages costs 1.5 times as much."""
    time_slice = TimeSlice()
    for item in items:
        messages.add(**fields_of(item))
        # After each of them: a message can contain 50 others.
        if time_slice.is_over:
            await time_slice.pause()
