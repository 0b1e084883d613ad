"""Fair shares of scarce resources: connections, hashing threads, the writer.

The cap is the dynamic threshold that Choudhury and Hahne (1998) describe for switches whose ports share a
buffer: the more the others hold, the smaller is a caller's cap. It needs no list of callers.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Generic, TypeVar

from service.auth.caller import ANONYMOUS_IDENTITY, SYSTEM, current_share

T = TypeVar("T")

# Without authentication all callers are the same one; the server's own work is bounded elsewhere.
UNCAPPED = frozenset({SYSTEM, ANONYMOUS_IDENTITY})
MANY_ROWS = 200  # converting them takes a millisecond


class FairSemaphore:
    """A semaphore whose slots are shared among callers.

    Waiting callers take turns; the waiters of one caller are served in the order of their arrival. A caller
    may hold at most a part of the slots that the others do not hold, by default half, rounded up: slow work
    that can't be interrupted leaves room for new callers. A weight is a number of slots, at most all of them.
    """

    def __init__(self, size: int, part: int = 2, uncapped: Collection[str] = UNCAPPED) -> None:
        self.size = size
        self._part = part
        self._uncapped = uncapped
        self._free = size
        self._held: dict[str, int] = {}
        # Callers in the order in which they take turns; for each, waiters with their weights by arrival.
        self._waiting: dict[str, dict[asyncio.Future[None], int]] = {}

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self._free

    def held(self, caller: str) -> int:
        """Return the number of slots that a caller holds."""
        return self._held.get(caller, 0)

    def waiting(self, caller: str) -> int:
        """Return the number of waiting acquisitions of a caller."""
        return len(self._waiting.get(caller, ()))

    def is_capped(self, caller: str, weight: int = 1) -> bool:
        """Return whether the caller's share is used up, even if slots are free."""
        held = self._held.get(caller)
        if held is None or caller in self._uncapped:
            return False
        return held + min(weight, self.size) > -(-(self._free + held) // self._part)

    def try_acquire(self, caller: str, weight: int = 1) -> bool:
        """Acquire slots if they are available now; return whether it did."""
        weight = min(weight, self.size)
        if self._waiting or weight > self._free or self.is_capped(caller, weight):
            return False
        self._take(caller, weight)
        return True

    async def acquire(self, caller: str, weight: int = 1, timeout: float | None = None) -> None:
        """Acquire slots; raises TimeoutError after `timeout` seconds."""
        if self.try_acquire(caller, weight):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, {})[waiter] = min(weight, self.size)
        self._serve()
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except BaseException:
            self._give_up(caller, waiter, weight)
            raise

    def release(self, caller: str, weight: int = 1) -> None:
        """Release slots."""
        weight = min(weight, self.size)
        self._free += weight
        self._held[caller] -= weight
        if not self._held[caller]:
            del self._held[caller]
        self._serve()

    def _take(self, caller: str, weight: int) -> None:
        self._free -= weight
        self._held[caller] = self._held.get(caller, 0) + weight

    def _give_up(self, caller: str, waiter: asyncio.Future[None], weight: int) -> None:
        if waiter.done() and not waiter.cancelled():  # it was served just before the cancellation
            self.release(caller, weight)
            return
        waiters = self._waiting.get(caller, {})
        waiters.pop(waiter, None)
        if not waiters:
            self._waiting.pop(caller, None)
        self._serve()  # others may need fewer slots

    def _serve(self) -> None:
        while caller := self._next_caller():
            waiters = self._waiting.pop(caller)
            waiter = next(iter(waiters))
            weight = waiters.pop(waiter)
            if waiters:
                self._waiting[caller] = waiters  # after all others
            if not waiter.done():
                self._take(caller, weight)
                waiter.set_result(None)

    def _next_caller(self) -> str | None:
        """Return the first caller whose share is not used up, None if it has to wait for more slots."""
        for caller, waiters in self._waiting.items():
            weight = next(iter(waiters.values()))
            if not self.is_capped(caller, weight):
                # Serving lighter waiters before a heavy one could starve it.
                return caller if weight <= self._free else None
        return None


class LoopTurns:
    """Schedules long work on the event loop, such as converting a thousand rows, for each caller in turn.

    At most one piece of work starts in an iteration of the loop, so that other callbacks run in between. If a
    caller has more pieces waiting, its next one starts only after a pause as long as the last one took.
    """

    def __init__(self) -> None:
        self._shares = FairSemaphore(1)

    async def next(self, rows: int) -> None:
        """Wait until work on this number of rows may start; it must follow without an await."""
        if rows < MANY_ROWS:
            return
        caller = current_share()
        await self._shares.acquire(caller)
        loop = asyncio.get_running_loop()
        loop.call_soon(self._end, loop, caller, loop.time())

    def _end(self, loop: asyncio.AbstractEventLoop, caller: str, began: float) -> None:
        if self._shares.waiting(caller) and caller not in UNCAPPED:
            loop.call_later(loop.time() - began, self._shares.release, caller)
        else:
            self._shares.release(caller)


class FairQueue(Generic[T]):
    """A queue that serves callers in turn, and the items of each caller in order."""

    def __init__(self) -> None:
        self._items: dict[str, deque[T]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, caller: str, item: T) -> None:
        """Add an item after the others of its caller."""
        items = self._items.get(caller)
        if items is None:
            items = self._items[caller] = deque()
        items.append(item)
        self._size += 1

    def get(self) -> T:
        """Remove and return the next item; raises StopIteration if there is none."""
        caller = next(iter(self._items))
        items = self._items[caller]
        item = items.popleft()
        self._size -= 1
        if not items:
            del self._items[caller]
        elif len(self._items) > 1:
            self._items[caller] = self._items.pop(caller)
        return item

    def __iter__(self) -> Iterator[T]:
        """Yield the items without removing them, caller by caller."""
        return chain.from_iterable(self._items.values())

    def clear(self) -> list[T]:
        """Remove and return all items."""
        items = list(self)
        self._items, self._size = {}, 0
        return items

    def discard(self, is_unwanted: Callable[[T], bool]) -> None:
        """Remove the items for which the function returns True."""
        for caller in list(self._items):
            kept = deque(item for item in self._items[caller] if not is_unwanted(item))
            self._size += len(kept) - len(self._items[caller])
            self._items[caller] = kept
            if not kept:
                del self._items[caller]
