"""A search for the first of several places that succeeds, which does not wait for a silent one.

Places are tried in their order. The next attempt begins when the last one fails, or after a moment without an
answer, as for the addresses of a name (RFC 8305, section 5): a server that is stopped or unreachable does not
answer at all. Attempts that have begun go on, and the first one that succeeds wins.

Places that have failed are tried again while others are silent: during a failover, one of them is promoted.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

NEXT_SECONDS = 0.25  # that of RFC 8305
AGAIN_SECONDS = 1.0


class Closable(Protocol):
    """A connection that can be closed at once."""

    def terminate(self) -> None:
        """Close it without waiting for the other side."""


Place = TypeVar("Place")
FoundT = TypeVar("FoundT", bound=Closable)


class Search(Generic[Place, FoundT]):
    """A search among `places`; it ends when all have failed once.

    `attempt` raises an error of `passing` if other places may succeed. Any other error ends the search: the
    places after it don't count, but those before it that have not answered yet may still succeed.
    """

    def __init__(
        self,
        places: Sequence[Place],
        attempt: Callable[[Place], Awaitable[FoundT]],
        passing: tuple[type[Exception], ...],
    ) -> None:
        self._places = places
        self._attempt = attempt
        self._passing = passing
        self._next = deque(range(len(places)))
        self._attempts: dict[asyncio.Future[FoundT], int] = {}
        self._errors: dict[int, BaseException] = {}
        self._refusal: BaseException | None = None
        self._end = len(places)

    @property
    def errors(self) -> list[tuple[Place, BaseException]]:
        """The places that have failed, in their order, with their last errors."""
        return [(self._places[number], error) for number, error in sorted(self._errors.items())]

    async def run(self) -> FoundT | None:
        """Return the result of the first attempt that succeeds, None if all places fail."""
        try:
            while not self._errors.keys() >= {*range(self._end)}:
                self._begin_next()
                done = await self._wait()
                for attempt in sorted(done, key=self._attempts.__getitem__):
                    number = self._attempts.pop(attempt)
                    error = attempt.exception()
                    if error is None:
                        return attempt.result()
                    self._note(number, error)
        finally:
            for attempt in self._attempts:
                _discard(attempt)
        if self._refusal:
            raise self._refusal
        return None

    def _begin_next(self) -> None:
        if self._next:
            number = self._next.popleft()
            self._attempts[asyncio.ensure_future(self._attempt(self._places[number]))] = number

    async def _wait(self) -> set[asyncio.Future[FoundT]]:
        """Return the attempts that have ended, none if it is time for the next one."""
        pause = NEXT_SECONDS if self._next else AGAIN_SECONDS
        done, _ = await asyncio.wait(self._attempts, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        if not done and not self._next:
            self._next.extend(number for number in sorted(self._errors) if number < self._end)
        return done

    def _note(self, number: int, error: BaseException) -> None:
        if isinstance(error, self._passing):
            self._errors[number] = error
        elif number < self._end:
            self._refusal, self._end = error, number
            self._next = deque(each for each in self._next if each < number)


def _discard(attempt: "asyncio.Future[Any]") -> None:
    """End an attempt, and close what it finds in the meantime."""

    def close(ended: "asyncio.Future[Any]") -> None:
        if not ended.cancelled() and ended.exception() is None:
            ended.result().terminate()

    attempt.add_done_callback(close)
    attempt.cancel()
