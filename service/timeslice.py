"""Time slices: long work lets other callbacks of the event loop run between its steps."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar

# Short enough that nobody notices; long enough that the turns of the loop cost a batch of rows under 1 %.
SLICE_SECONDS = 0.004
STEP = 100  # items; each takes a few microseconds
MESSAGES = 5  # messages; each may have 50 others in it

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class TimeSlice:
    """How long a task may still hold the event loop; call `pause` between steps of few milliseconds each."""

    def __init__(self) -> None:
        self._end = perf_counter() + SLICE_SECONDS

    async def pause(self) -> None:
        """Let other callbacks run if the slice is used up."""
        if perf_counter() >= self._end:
            await asyncio.sleep(0)
            self._end = perf_counter() + SLICE_SECONDS


async def slices(items: Sequence[ItemT], step: int = STEP) -> AsyncIterator[Sequence[ItemT]]:
    """Yield the items, some at a time; other callbacks run in between once a slice is used up."""
    time_slice = TimeSlice()
    for start in range(0, len(items), step):
        yield items[start : start + step]
        await time_slice.pause()


async def map_in_slices(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], step: int = STEP
) -> list[ResultT]:
    """Return the function's result for each item."""
    found: list[ResultT] = []
    async for some in slices(items, step):
        found += map(function, some)
    return found


async def add_in_slices(
    messages: Any, fields_of: Callable[[ItemT], dict[str, Any]], items: Sequence[ItemT]
) -> None:
    """Add a message for each item to a repeated field, in place: a copy of each costs half as much again."""
    async for some in slices(items, MESSAGES):
        for item in some:
            messages.add(**fields_of(item))
