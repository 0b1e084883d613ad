"""A load through crashes: no row is lost or duplicated, and repeated outcomes are the same."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.crash import draw_history, replay
from tests.faults.histories import SEED, saved_histories
from tests.support.postgres import PostgresServer


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server with fsync, which survives crashes."""
    with PostgresServer(fsync=True) as postgres:
        yield postgres


@pytest.mark.parametrize("history", saved_histories("crash"))
async def test_history_that_once_failed_passes(
    mortal_postgres: PostgresServer, tmp_path: Path, history: dict[str, Any]
) -> None:
    """Every history that has failed is saved."""
    await replay(history, mortal_postgres, tmp_path)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_load_survives_all_faults(
    mortal_postgres: PostgresServer, tmp_path: Path, database: str
) -> None:
    """In a random order; `make test-crash` runs further orders."""
    await replay(draw_history(Random(SEED), database), mortal_postgres, tmp_path)
