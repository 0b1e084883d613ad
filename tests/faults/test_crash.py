"""A load through crashes: nothing is lost, nothing is doubled, and what is told twice is told alike."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from service.db import migrations
from tests.faults.crash import Trial, drawn
from tests.faults.histories import SEED, keeping, kept
from tests.postgres import PostgresServer


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that keeps its promises through crashes."""
    with PostgresServer(fsync=True) as postgres:
        yield postgres


async def run(history: dict[str, Any], postgres: PostgresServer, folder: Path) -> None:
    with keeping("crash", history):
        if history["database"] == "sqlite":
            await Trial(history, f"sqlite:///{folder}/roster.db", folder / "log", None).run()
            return
        async with postgres.database() as url:
            await asyncio.to_thread(migrations.upgrade, url)
            await Trial(history, url, folder / "log", postgres).run()


@pytest.mark.parametrize("history", kept("crash"))
async def test_a_history_that_failed_once_goes_well(
    mortal_postgres: PostgresServer, tmp_path: Path, history: dict[str, Any]
) -> None:
    """Each one that the tests have ever found is kept."""
    await run(history, mortal_postgres, tmp_path)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_a_load_comes_through_all_faults(
    mortal_postgres: PostgresServer, tmp_path: Path, database: str
) -> None:
    """One after the other, in a random order; `make test-crash` goes on with other orders."""
    await run(drawn(Random(SEED), database), mortal_postgres, tmp_path)
