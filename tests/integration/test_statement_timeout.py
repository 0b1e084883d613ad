"""Statements end at their timeout, and when their caller is cancelled, on both databases."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Integer, column, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from roster.errors import StatementTimeout
from service.db.compiled import CompiledSelect
from service.db.engine import Database
from service.settings import Settings
from service.users.model import User

TIMEOUT_SECONDS = 0.3
PATIENCE_SECONDS = 20  # a loaded machine is slow, and statements without an end would take longer
ENDLESS = 10**9  # rows that take minutes to count, not one of them much
COUNTED = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {})"
SERIES = {
    "sqlite": COUNTED + "SELECT max(i) AS i FROM n",
    "postgresql": "SELECT max(i) AS i FROM generate_series(1, {}::bigint) AS n(i)",
}


@pytest.fixture
async def impatient(database_url: str) -> AsyncIterator[Database]:
    """A database with a statement timeout of a third of a second, and one connection for reads."""
    settings = Settings(
        database_url=database_url, statement_timeout=TIMEOUT_SECONDS, pool_size=1, max_overflow=0
    )
    database = Database(settings)
    yield database
    await database.close()


@pytest.fixture
async def patient(database_url: str) -> AsyncIterator[Database]:
    """A database with one connection for reads, and a statement timeout of minutes."""
    settings = Settings(
        database_url=database_url, statement_timeout=600, pool_timeout=30, pool_size=1, max_overflow=0
    )
    database = Database(settings)
    yield database
    await database.close()


def endless(database: Database) -> Any:
    return text(SERIES[database.engine.dialect.name].format(ENDLESS))


async def count(session: AsyncSession) -> int | None:
    return await session.scalar(select(func.count()).select_from(User))


async def test_read_ends_at_the_statement_timeout(impatient: Database) -> None:
    """Both databases raise the same error, and the next read on the connection succeeds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        for _ in range(3):
            with pytest.raises(StatementTimeout):
                async with impatient.read() as session:
                    await session.execute(endless(impatient))
            async with impatient.read() as session:
                assert await count(session) == 0


async def endless_write(database: Database, unit: str) -> None:
    async with getattr(database, unit)() as session:
        async with session.begin_nested():
            await session.execute(insert(User).values(email="first@example.org"))
        async with session.begin_nested():
            await session.execute(endless(database))


async def write(database: Database, unit: str, email: str) -> None:
    async with getattr(database, unit)() as session:
        await session.execute(insert(User).values(email=email))


@pytest.mark.parametrize("unit", ["begin", "bulk"])
async def test_write_that_times_out_is_rolled_back(impatient: Database, unit: str) -> None:
    """Including released savepoints; the next write succeeds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(StatementTimeout):
            await endless_write(impatient, unit)
        await write(impatient, unit, "second@example.org")

        async with impatient.read() as session:
            assert list(await session.scalars(select(User.email))) == ["second@example.org"]


async def test_unit_of_work_commits_nothing_after_a_timeout(impatient: Database) -> None:
    """SQLite ends the transaction with the statement; later ones must not commit alone."""

    async def go_on() -> None:
        async with impatient.begin() as session:
            await session.execute(insert(User).values(email="first@example.org"))
            with suppress(DBAPIError):
                await session.execute(endless(impatient))
            await session.execute(insert(User).values(email="second@example.org"))

    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(Exception):  # noqa: B017, PT011 - each database says it differently
            await go_on()
        async with impatient.read() as session:
            assert await count(session) == 0


async def test_executemany_ends_at_the_timeout(sqlite_url: str) -> None:
    """For its caller it is one statement; for SQLite each row is one."""
    database = Database(Settings(database_url=sqlite_url, statement_timeout=TIMEOUT_SECONDS))
    rows = [("ada@example.org",)] * 5_000_000

    async def write_many() -> None:
        async with database.begin() as session:
            connection = await session.connection()
            await connection.exec_driver_sql("INSERT INTO users (email) SELECT ? WHERE false", rows)

    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(StatementTimeout):
            await write_many()
        async with database.read() as session:
            assert await count(session) == 0
    await database.close()


@pytest.mark.parametrize("unit", ["read", "begin", "bulk"])
async def test_cancellation_ends_the_statement(patient: Database, unit: str) -> None:
    """The connection is free long before the statement would have ended."""
    begun = asyncio.Event()
    for engine in (patient.engine, patient._engines.reader, patient._engines.bulk):
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: begun.set())

    async def stay() -> None:
        async with getattr(patient, unit)() as session:
            await session.execute(endless(patient))

    async with asyncio.timeout(PATIENCE_SECONDS):
        for _ in range(3):
            begun.clear()
            leaving = asyncio.create_task(stay())
            await begun.wait()
            leaving.cancel()
            await asyncio.wait([leaving])
            async with getattr(patient, unit)() as session:
                assert await count(session) == 0


async def test_cancellation_ends_a_fetch_of_the_driver(patient: Database) -> None:
    """Its connection is replaced."""
    dialect = patient.engine.dialect
    series = text(f"({SERIES[dialect.name].format(ENDLESS)}) AS series")
    query = CompiledSelect(select(column("i", Integer)).select_from(series), dialect)

    async def stay(begun: asyncio.Event) -> None:
        begun.set()
        await patient.rows(query)

    async with asyncio.timeout(PATIENCE_SECONDS):
        begun = asyncio.Event()
        leaving = asyncio.create_task(stay(begun))
        await begun.wait()
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        async with patient.read() as session:
            assert await count(session) == 0


async def test_cancellation_never_ends_another_statement(patient: Database) -> None:
    """Other readers get their rows, whenever their neighbours are cancelled."""

    async def read() -> int | None:
        async with patient.read() as session:
            return await count(session)

    async with asyncio.timeout(PATIENCE_SECONDS):
        for turns in range(40):
            leaving, staying = asyncio.create_task(read()), asyncio.create_task(read())
            for _ in range(turns):
                await asyncio.sleep(0)
            leaving.cancel()
            assert await staying == 0
            await asyncio.wait([leaving])
