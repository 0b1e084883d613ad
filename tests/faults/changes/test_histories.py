"""Mirrors of the change feed through random histories; `make test-changes` runs many more, with crashes."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import pytest

from tests.faults.changes.history import draw_history, replay
from tests.faults.changes.mutants import MUTANTS, mutant
from tests.faults.changes.sqlite_history import draw_history_on_sqlite, replay_on_sqlite
from tests.faults.histories import SEED, save_if_failed, saved_histories
from tests.support.postgres import Postgres

AT_ONCE = 3

Replay = Callable[[dict[str, Any], str], Awaitable[None]]


async def replay_and_save(kind: str, replay: Replay, history: dict[str, Any], url: str) -> None:
    """Run a history, and save it if it fails."""
    with save_if_failed(kind, history):
        await replay(history, url)


@pytest.mark.parametrize("history", saved_histories("feed"))
async def test_history_that_once_failed_passes(postgresql_url: str, history: dict[str, Any]) -> None:
    """Every history that has failed is saved."""
    await replay(history, postgresql_url)


async def test_mirrors_are_equal_to_the_tables(postgres: Postgres, postgresql_template: str) -> None:
    """Each history has a database of its own; they are played at the same time, because they wait for 5 s."""
    random = Random(SEED)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            url = await stack.enter_async_context(postgres.database(postgresql_template))
            group.create_task(replay_and_save("feed", replay, draw_history(random), url))


async def test_mirrors_of_sqlite_are_equal_to_the_tables(sqlite_url: str) -> None:
    history = draw_history_on_sqlite(Random(SEED))
    await replay_and_save("feed-of-sqlite", replay_on_sqlite, history, sqlite_url)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_apply_to_the_code(name: str) -> None:
    """`make test-changes` shows that the histories catch them."""
    with mutant(name):
        pass
