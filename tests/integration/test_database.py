"""The engines and their pools, units of work, and sessions for reading."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, insert, make_url, select, text
from sqlalchemy.exc import IntegrityError

from roster.errors import DatabaseUnavailable, PoolExhausted, QuotaExceeded
from service.auth.caller import NOBODY, Caller, set_caller
from service.db.engine import Database
from service.settings import Settings
from service.users.model import User
from tests.support.rival import LOCK_COMMITS, delay_commits, rival
from tests.support.rows import add_posts, add_users, read_emails


@pytest.fixture
async def small(database_url: str) -> AsyncIterator[Database]:
    """A database with one connection for calls and a short wait for it."""
    database = Database(Settings(database_url=database_url, pool_size=1, max_overflow=0, pool_timeout=0.1))
    yield database
    await database.close()


@pytest.fixture
async def embedded(sqlite_url: str) -> AsyncIterator[Database]:
    """A database on SQLite."""
    database = Database(Settings(database_url=sqlite_url))
    yield database
    await database.close()


@pytest.fixture
async def big(postgresql_url: str) -> AsyncIterator[Database]:
    """A database on PostgreSQL."""
    database = Database(Settings(database_url=postgresql_url, pool_timeout=0.1, bulk_connections=4))
    yield database
    await database.close()


@pytest.fixture
def file(sqlite_url: str) -> Path:
    """The file of the embedded database."""
    return Path(str(make_url(sqlite_url).database))


def write_from_another_process(file: Path) -> None:
    """Write as another process would; raises OperationalError immediately while somebody else writes."""
    with closing(sqlite3.connect(file, timeout=0)) as connection, connection:
        connection.execute("INSERT INTO users (email) VALUES ('elsewhere@example.org')")


async def test_unit_of_work_commits_at_its_end(database: Database) -> None:
    """Other sessions then see its writes."""
    async with database.begin() as session:
        await session.execute(insert(User).values(email="ada@example.org"))

    assert await read_emails(database) == ["ada@example.org"]


async def test_exception_rolls_back(database: Database) -> None:
    """Nothing is stored, and the exception is raised unchanged."""

    async def call() -> None:
        async with database.begin() as session:
            await session.execute(insert(User).values(email="ada@example.org"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await call()
    assert await read_emails(database) == []


async def test_cancellation_before_commit_rolls_back(database: Database) -> None:
    """Nothing is stored, and the next call can write."""
    written = asyncio.Event()

    async def call() -> None:
        async with database.begin() as session:
            await session.execute(insert(User).values(email="ada@example.org"))
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await add_users(database)
    assert await read_emails(database) == ["user0@example.org"]


@pytest.mark.parametrize("times", [1, 2])
async def test_cancellation_during_commit_does_not_stop_it(database: Database, times: int) -> None:
    """Even a second one: the rows are stored."""
    loop = asyncio.get_running_loop()

    async def call() -> None:
        async with database.begin() as session:
            await session.execute(insert(User).values(email="ada@example.org"))

    def cancel(left: int) -> None:
        task.cancel()
        if left > 1:
            loop.call_soon(cancel, left - 1)

    task = asyncio.create_task(call())
    event.listen(database.engine.sync_engine, "commit", lambda _: cancel(times), once=True)
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await read_emails(database) == ["ada@example.org"]


async def test_a_cancelled_commit_is_completed(big: Database, postgresql_url: str) -> None:
    """A caller that is cancelled during its commit waits until PostgreSQL has committed."""
    await delay_commits(postgresql_url)
    async with rival(postgresql_url) as other:
        await other.execute(LOCK_COMMITS)
        task = asyncio.create_task(add_users(big))
        await other.wait_for_blocked()
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.2)
        assert not done
        await other.rollback()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await read_emails(big) == ["user0@example.org"]


async def test_read_holds_no_transaction(database: Database) -> None:
    """Each statement sees earlier commits, and no transaction stays open."""
    async with database.read() as session:
        count = select(func.count()).select_from(User)
        before = await session.scalar(count)
        await add_users(database)
        after = await session.scalar(count)
        connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection

        assert (before, after) == (0, 1)
        is_open = connection.in_transaction if database.is_sqlite else connection.is_in_transaction()
        assert is_open is False


async def test_an_exhausted_pool_refuses_within_its_timeout(small: Database) -> None:
    """A call that gets no connection within `pool_timeout` fails; it succeeds once one is free."""
    async with small.begin() as session:
        await session.execute(select(1))
        async with asyncio.timeout(5):
            with pytest.raises(PoolExhausted):
                await add_users(small)

    await add_users(small)
    assert await read_emails(small) == ["user0@example.org"]


async def test_an_exhausted_pool_refuses_reads_too(small: Database) -> None:
    """A read that gets no connection within `pool_timeout` fails; it succeeds once one is free."""
    async with small.read() as session:
        await session.execute(select(1))
        async with asyncio.timeout(5):
            with pytest.raises(PoolExhausted):
                await small.ping()

    await small.ping()


async def test_caller_gets_only_its_share_of_connections(database_url: str) -> None:
    """Further calls are refused with the numbers; another caller still gets a connection."""
    settings = Settings(database_url=database_url, pool_size=8, max_overflow=0, pool_timeout=0.1)
    database = Database(settings)
    share = 1 if database.is_sqlite else 2
    set_caller(Caller("greedy"))
    async with AsyncExitStack() as stack:
        for _ in range(share):
            await stack.enter_async_context(database.read())
        with pytest.raises(QuotaExceeded, match=f"hold {share} of 8 connections"):
            await database.ping()
        set_caller(Caller("modest"))
        await database.ping()
    set_caller(NOBODY)
    await database.close()


async def test_cancelled_read_returns_its_connection(postgresql_url: str) -> None:
    """Its statement ends in the database before the next call gets the connection."""
    database = Database(Settings(database_url=postgresql_url, pool_size=1, max_overflow=0))
    connections = []
    event.listen(database.engine.sync_engine, "connect", lambda *_: connections.append(1))
    begun = asyncio.Event()

    async def slow() -> None:
        async with database.read() as session:
            await session.execute(select(1))
            asyncio.get_running_loop().call_later(0.1, begun.set)
            await session.execute(text("SELECT pg_sleep(60)"))

    for _ in range(2):
        task = asyncio.create_task(slow())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await database.ping()
    assert len(connections) == 1
    await database.close()


async def test_calls_do_not_wait_for_loads(big: Database) -> None:
    """Loads have their own connections."""
    async with AsyncExitStack() as loads:
        for _ in range(4):
            session = await loads.enter_async_context(big.bulk())
            await session.execute(select(1))
        await add_users(big)

    assert await read_emails(big) == ["user0@example.org"]


async def test_missing_database_is_unavailable(database_url: str) -> None:
    """No server answers, or the file can't be opened: the call is retryable."""
    url = make_url(database_url).set(
        **({"database": "/dev/null/roster.db"} if "sqlite" in database_url else {"port": 1})
    )
    database = Database(Settings(database_url=url.render_as_string(hide_password=False)))
    with pytest.raises(DatabaseUnavailable):
        await database.ping()
    await database.close()


async def test_foreign_keys_are_enforced(database: Database) -> None:
    """A post without an existing author is refused, on SQLite too."""
    with pytest.raises(IntegrityError):
        await add_posts(database, [4711])


async def test_ids_of_deleted_rows_are_never_reused(database: Database) -> None:
    """Not even the largest one."""
    (deleted,) = await add_users(database)
    async with database.begin() as session:
        await session.delete(await session.get_one(User, deleted))

    (next_id,) = await add_users(database)
    assert next_id > deleted


async def test_sqlite_writers_are_served_in_order(embedded: Database) -> None:
    """SQLite has one writer; others wait in a queue."""
    order = []

    async def write(number: int) -> None:
        async with embedded.begin() as session:
            order.append(number)
            await session.execute(insert(User).values(email=f"{number}@example.org"))

    async with embedded.begin():
        waiting = [asyncio.create_task(write(number)) for number in range(10)]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)

    assert order == list(range(10))
    assert await read_emails(embedded) == [f"{number}@example.org" for number in range(10)]


async def test_unit_of_work_locks_sqlite_before_it_reads(embedded: Database, file: Path) -> None:
    """BEGIN IMMEDIATE: no other write can come between its read and its write."""
    async with embedded.begin() as session:
        await session.execute(select(1))
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            write_from_another_process(file)

    write_from_another_process(file)


async def test_read_does_not_block_writers(embedded: Database, file: Path) -> None:
    """Other processes write during a read."""
    async with embedded.read() as session:
        await session.execute(select(User.id))
        write_from_another_process(file)

    assert await read_emails(embedded) == ["elsewhere@example.org"]


async def test_write_does_not_block_readers(embedded: Database) -> None:
    """With WAL they see the last commit."""
    async with embedded.begin() as session:
        await session.execute(insert(User).values(email="ada@example.org"))
        assert await read_emails(embedded) == []

    async with embedded.read() as session:
        assert await session.scalar(text("PRAGMA journal_mode")) == "wal"


async def test_a_reader_can_t_write(embedded: Database) -> None:
    """SQLite refuses a write in a session for reading."""
    with pytest.raises(DatabaseUnavailable):
        async with embedded.read() as session:
            await session.execute(insert(User).values(email="ada@example.org"))

    assert await read_emails(embedded) == []


@pytest.mark.parametrize("setting", ["statement_timeout", "idle_in_transaction_session_timeout"])
async def test_postgresql_has_timeouts_for_statements_and_transactions(big: Database, setting: str) -> None:
    """For calls and for loads."""
    for begin in (big.begin, big.bulk, big.read):
        async with begin() as session:
            assert await session.scalar(text(f"SHOW {setting}")) == "30s"
