"""Bounds how many calls wait for their clients, and for how long."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from roster.errors import Draining, QuotaExceeded, RosterError

T = TypeVar("T")

SWEEP_INTERVAL_SECONDS = 0.5


@dataclass(eq=False, slots=True)
class Wait:
    """A call that has waited since `began`; `group` is called only if there are too many waits."""

    task: "asyncio.Task[None]"
    group: Callable[[], str]
    began: float
    refusal: RosterError | None = None  # the error that ended it

    def end(self, refusal: RosterError) -> None:
        """End the wait with an error, once: a second cancellation would interrupt the call's cleanup."""
        if self.refusal is None:
            self.refusal = refusal
            self.task.cancel()


class BoundedWaits:
    """Waits of calls for their clients: at most `most` at a time, each for at most `seconds`.

    Twice a second the waits that have lasted too long are ended. If there are still too many, the group with
    the most waits loses its oldest one, again and again: a group that opens thousands does not displace the
    others. Waits of less than half a second don't count, since a burst of calls has hundreds of them.
    """

    def __init__(self, refusal: str, most: int, seconds: float | None = None) -> None:
        self._refusal = refusal
        self._most = most
        self._seconds = seconds
        self._waits: dict[Wait, None] = {}  # in order of age, the oldest first
        self._is_sweeping = False

    async def bound(self, awaitable: Awaitable[T], group: Callable[[], str]) -> T:
        """Await something within the bounds; raises QuotaExceeded if the wait is ended."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        wait = Wait(task, group, asyncio.get_running_loop().time())
        self._waits[wait] = None
        if not self._is_sweeping:
            self._sweep_later()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if wait.refusal is None:
                raise
            task.uncancel()
            raise wait.refusal from None
        finally:
            del self._waits[wait]

    def end_all(self) -> None:
        """End all waits with Draining."""
        for wait in self._waits:
            wait.end(Draining("the server is stopping; nothing was done, send the call again"))

    def _sweep_later(self) -> None:
        self._is_sweeping = True
        asyncio.get_running_loop().call_later(SWEEP_INTERVAL_SECONDS, self._sweep)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        counted = [wait for wait in self._waits if now - wait.began >= SWEEP_INTERVAL_SECONDS]
        if self._seconds is not None:
            while counted and now - counted[0].began >= self._seconds:
                counted.pop(0).end(QuotaExceeded(self._refusal))
        for wait in _surplus(counted, self._most):
            wait.end(QuotaExceeded(self._refusal))
        self._is_sweeping = False
        if self._waits:
            self._sweep_later()


def _surplus(waits: Sequence[Wait], most: int) -> Iterator[Wait]:
    """Yield the waits in excess of `most`: each is the oldest of the group that then has the most."""
    if len(waits) <= most:
        return
    groups: dict[str, deque[Wait]] = {}
    for wait in waits:
        groups.setdefault(wait.group(), deque()).append(wait)
    for _ in range(len(waits) - most):
        yield max(groups.values(), key=len).popleft()
