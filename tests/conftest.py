"""Migrated databases for the tests; a test that uses `database_url` runs on both kinds."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from service.db import migrations
from service.db.engine import Database
from service.settings import Settings
from tests.support.postgres import Postgres, PostgresServer
from tests.support.watchdog import watching

# Read when grpc is imported, after this file. Its fork handlers can crash the child that starts PostgreSQL.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# Many servers run at a time, and few tests read their metrics.
os.environ["ROSTER_METRICS_LISTEN"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail a test in which a callback of the service holds the event loop for more than 20 ms."""
    with watching() as recorder:
        result = yield
    if recorder.holds:
        pytest.fail("\n".join(recorder.holds), pytrace=False)
    return result


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server that ROSTER_TEST_DATABASE_URL names, or one started for the session."""
    url = os.environ.get("ROSTER_TEST_DATABASE_URL")
    if url:
        yield Postgres(make_url(url))
        return
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
async def postgresql_template(postgres: Postgres) -> AsyncIterator[str]:
    """The name of a migrated database, which CREATE DATABASE copies faster than migrations run."""
    async with postgres.database() as url:
        await asyncio.to_thread(migrations.upgrade, url)
        yield str(make_url(url).database)


@pytest.fixture(scope="session")
async def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file."""
    path = tmp_path_factory.mktemp("template") / "roster.db"
    await asyncio.to_thread(migrations.upgrade, f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
async def postgresql_url(postgres: Postgres, postgresql_template: str) -> AsyncIterator[str]:
    """A database of the test on PostgreSQL."""
    async with postgres.database(postgresql_template) as url:
        yield url


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A database of the test on SQLite."""
    return f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path)}"


@pytest.fixture
async def empty_postgresql_url(postgres: Postgres) -> AsyncIterator[str]:
    """An empty database of the test's own on PostgreSQL."""
    async with postgres.database() as url:
        yield url


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """A file of the test's own that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path}/empty.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """An empty database of the test's own, on SQLite and on PostgreSQL."""
    return str(request.getfixturevalue(f"empty_{request.param}_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database of the test, on SQLite and on PostgreSQL."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The `Database` on a database of the test."""
    database = Database(Settings(database_url=database_url))
    yield database
    await database.close()
