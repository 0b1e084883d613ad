"""Calls are counted and logged after their responses."""

import asyncio

import pytest

from service.interceptors.observe import Afterwards


async def test_failure_affects_no_other_call(caplog: pytest.LogCaptureFixture) -> None:
    """The others are counted and logged, and so are later ones; the failure is logged."""
    done: list[str] = []
    afterwards = Afterwards()

    def fail() -> None:
        raise ValueError("a test's own")

    for name in ("first", "second"):
        afterwards.add(fail)
        afterwards.add(lambda name=name: done.append(name))  # type: ignore[misc]
        await asyncio.sleep(0)
    assert done == ["first", "second"]
    assert [record.getMessage() for record in caplog.records] == ["a call could not be counted or logged"] * 2
