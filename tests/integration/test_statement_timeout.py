"""A statement that takes too long ends on both databases, and so does one whose caller has left."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Integer, column, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.compiled import CompiledSelect
from service.db.engine import Database
from service.errors import StatementTimeout
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
    """A database whose statements have a third of a second, with one connection for reads."""
    settings = Settings(
        database_url=database_url, statement_timeout=TIMEOUT_SECONDS, pool_size=1, max_overflow=0
    )
    database = Database(settings)
    yield database
    await database.close()


@pytest.fixture
async def patient(database_url: str) -> AsyncIterator[Database]:
    """A database with one connection for reads, whose statements may take minutes."""
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


async def test_a_read_ends_at_the_statement_timeout_and_the_next_one_succeeds(impatient: Database) -> None:
    """The error is the same on both databases; nothing of the first statement is left on the connection."""
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
async def test_a_write_that_times_out_is_rolled_back_whole(impatient: Database, unit: str) -> None:
    """Nothing of it is stored, also not what a savepoint had released, and the next write succeeds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(StatementTimeout):
            await endless_write(impatient, unit)
        await write(impatient, unit, "second@example.org")

        async with impatient.read() as session:
            assert list(await session.scalars(select(User.email))) == ["second@example.org"]


async def test_a_unit_of_work_that_goes_on_after_a_timeout_commits_nothing(impatient: Database) -> None:
    """SQLite ends the transaction with the statement: what follows must not be committed by itself."""

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


async def test_many_short_statements_in_one_call_end_at_the_timeout(sqlite_url: str) -> None:
    """On SQLite an executemany is one statement to its caller; each of its rows is one to the database."""
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
async def test_a_statement_ends_when_its_caller_is_cancelled(patient: Database, unit: str) -> None:
    """The only connection is free again long before the statement would have ended."""
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


async def test_a_direct_fetch_ends_when_its_caller_is_cancelled(patient: Database) -> None:
    """Past SQLAlchemy as well: the connection is not used again, and another takes its place."""
    dialect = patient.engine.dialect
    series = text(f"({SERIES[dialect.name].format(ENDLESS)}) AS series")
    query = CompiledSelect(select(column("i", Integer)).select_from(series), dialect)

    async def stay(begun: asyncio.Event) -> None:
        async with patient.read() as session:
            connection = await session.connection()
            begun.set()
            await query.rows(connection)

    async with asyncio.timeout(PATIENCE_SECONDS):
        begun = asyncio.Event()
        leaving = asyncio.create_task(stay(begun))
        await begun.wait()
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        async with patient.read() as session:
            assert await count(session) == 0


async def test_a_cancelled_statement_never_ends_another(patient: Database) -> None:
    """Readers that stay get their answer, whenever their neighbours leave."""

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
