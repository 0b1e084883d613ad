"""A load through crashes: nothing is lost, nothing is doubled, and what is told twice is told alike."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.crash import drawn, replay
from tests.faults.histories import SEED, kept
from tests.support.postgres import PostgresServer


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that keeps its promises through crashes."""
    with PostgresServer(fsync=True) as postgres:
        yield postgres


@pytest.mark.parametrize("history", kept("crash"))
async def test_history_that_once_failed_passes(
    mortal_postgres: PostgresServer, tmp_path: Path, history: dict[str, Any]
) -> None:
    """Every history that has failed is kept."""
    await replay(history, mortal_postgres, tmp_path)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_load_survives_all_faults(
    mortal_postgres: PostgresServer, tmp_path: Path, database: str
) -> None:
    """One after the other, in a random order; `make test-crash` goes on with other orders."""
    await replay(drawn(Random(SEED), database), mortal_postgres, tmp_path)
