"""A search among places that succeed, fail, don't answer, or end it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import pytest

from service.db import search
from service.db.search import Search


class Found:
    """A connection to a place."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.terminated = asyncio.Event()

    def terminate(self) -> None:
        """Close it."""
        self.terminated.set()


class RefusalError(Exception):
    """An error that ends a search."""


Attempt = Callable[[str], Awaitable[Found]]


async def succeed(place: str) -> Found:
    """Answer at once."""
    return Found(place)


async def fail(place: str) -> Found:
    """Fail at once."""
    raise ConnectionError(f"{place} failed")


async def refuse(place: str) -> Found:
    """End the search."""
    raise RefusalError(place)


async def hang(place: str) -> Found:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses."""
    monkeypatch.setattr(search, "NEXT_SECONDS", 0.01)
    monkeypatch.setattr(search, "AGAIN_SECONDS", 0.01)


def search_among(places: Mapping[str, Attempt]) -> Search[str, Found]:
    """Return a search among places with these answers, in their order."""
    return Search([*places], lambda place: places[place](place), (ConnectionError,))


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([succeed, succeed], "0"),
        ([fail, succeed], "1"),
        ([hang, succeed, succeed], "1"),
        ([hang, fail, hang, succeed], "3"),
        ([succeed, refuse], "0"),
        ([fail, fail], None),
        ([fail], None),
    ],
)
async def test_first_success_wins(attempts: list[Attempt], expected: str | None) -> None:
    """In the order of the places; a silent one does not delay the next."""
    found = await search_among({str(number): attempt for number, attempt in enumerate(attempts)}).run()
    assert (found.place if found else None) == expected


async def test_errors_are_those_of_all_places_in_their_order() -> None:
    """Although the first place fails last."""
    may_fail = asyncio.Event()

    async def fail_last(place: str) -> Found:
        await may_fail.wait()
        return await fail(place)

    async def fail_first(place: str) -> Found:
        may_fail.set()
        return await fail(place)

    places = search_among({"a": fail_last, "b": fail_first})
    assert await places.run() is None
    assert [(place, str(error)) for place, error in places.errors] == [("a", "a failed"), ("b", "b failed")]


async def test_refusal_ends_the_search() -> None:
    """The place after it is not tried."""
    with pytest.raises(RefusalError):
        await search_among({"a": fail, "b": refuse, "c": succeed}).run()


@pytest.mark.parametrize("outcome", [succeed, fail])
async def test_earlier_place_counts_more_than_a_refusal(outcome: Attempt) -> None:
    """The refusal is raised only if the place before it fails."""
    is_refused = asyncio.Event()

    async def answer_late(place: str) -> Found:
        await is_refused.wait()
        return await outcome(place)

    async def refuse_first(place: str) -> Found:
        is_refused.set()
        return await refuse(place)

    places = search_among({"a": answer_late, "b": refuse_first, "c": succeed})
    if outcome is fail:
        with pytest.raises(RefusalError):
            await places.run()
        return
    found = await places.run()
    assert found
    assert found.place == "a"


async def test_place_is_tried_again_while_another_is_silent() -> None:
    """As a standby is that becomes the primary."""
    tries = 0

    async def be_promoted(place: str) -> Found:
        nonlocal tries
        tries += 1
        return await (succeed if tries > 2 else fail)(place)

    found = await search_among({"a": hang, "b": be_promoted}).run()
    assert found
    assert found.place == "b"


async def test_late_success_of_another_place_is_closed() -> None:
    """It can't be cancelled any more, and nobody will use it."""
    late = Found("a")

    async def ignore_cancellation(place: str) -> Found:
        try:
            return await hang(place)
        except asyncio.CancelledError:
            return late

    found = await search_among({"a": ignore_cancellation, "b": succeed}).run()
    await late.terminated.wait()
    assert found
    assert (found.place, found.terminated.is_set()) == ("b", False)


async def test_cancelled_search_cancels_its_attempts() -> None:
    """As when a caller's deadline expires."""
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def note_cancellation(place: str) -> Found:
        begun.set()
        try:
            return await hang(place)
        finally:
            cancelled.set()

    task = asyncio.create_task(search_among({"a": note_cancellation}).run())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    await cancelled.wait()
