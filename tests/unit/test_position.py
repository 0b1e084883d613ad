"""The position of the primary, and the lag of a replica."""

import asyncio

import pytest

from service.consistency import Position
from service.db import position
from service.db.position import MAX_NOTED, Lag, PrimaryPosition


def test_lag_ends_when_the_replica_has_replayed_everything() -> None:
    lag = Lag()
    lag.note(Position(1, 1, 500), 0)
    assert lag.measure(400, 3) == (3, 100)
    lag.note(Position(1, 1, 600), 4)
    assert lag.measure(500, 5) == (1, 100)
    assert lag.measure(600, 6) == (0, 0)


def test_lag_forgets_positions_that_a_failover_has_lost() -> None:
    """The new timeline begins before the end of the old one."""
    lag = Lag()
    lag.note(Position(1, 1, 500), 0)
    assert lag.measure(450, 1) == (1, 50)
    lag.note(Position(1, 2, 460), 10)
    assert lag.measure(460, 11) == (0, 0)


def test_lag_in_bytes_grows_as_long_as_the_replica_is_down() -> None:
    lag, seconds = Lag(), 2 * MAX_NOTED
    for second in range(seconds + 1):
        lag.note(Position(1, 1, second), second)
    assert lag.measure(None, seconds) == (seconds - 1, seconds)


async def test_query_that_hangs_does_not_hold_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callers get no position; later ones do."""
    monkeypatch.setattr(position, "QUERY_SECONDS", 0.05)
    expected, hangs = Position(1, 1, 1), [True]

    async def query() -> Position:
        if hangs and hangs.pop():
            await asyncio.Event().wait()
        return expected

    primary = PrimaryPosition(query)
    assert await primary.current(5) is None
    assert await primary.current(5) == expected
