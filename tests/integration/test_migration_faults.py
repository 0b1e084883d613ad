"""Migrations that are killed, that wait for a lock, or that find what another run has left."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import ddl, revisions
from service.db.migrations import MigrationError
from service.db.schema import Schema, read_schema
from tests.support.migrations import downgrade, execute, migrate_as_old_release, old_version, upgrade
from tests.support.postgres import Postgres

# For each line with a URL, a revision and a number: fork, migrate, and kill the fork before the statement or
# commit of this number; print the exit status. Reads don't count: they change nothing.
MORTAL = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from service.db import migrations, revisions

def migrate(url, revision, last):
    def die(*arguments):
        nonlocal last
        is_read = len(arguments) > 2 and arguments[2].lstrip().upper().startswith(("SELECT", "PRAGMA"))
        last -= not is_read
        if not last:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", die)
    event.listen(Engine, "commit", die)
    run = migrations.downgrade if revision == "0002" else migrations.upgrade
    run(url, revision)

for line in sys.stdin:
    url, revision, number = line.split()
    child = os.fork()
    if not child:
        migrate(url, revision, int(number))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
HEAD = revisions.head()
# `make test-upgrade` kills a migration before each statement, `make test` before every eleventh.
STEP = 1 if "ROSTER_TEST_UPGRADES" in os.environ else 11
# What `alembic_version` says at each revision of an upgrade.
OLD_VERSIONS = {
    "0002": "0002",
    "0003": "0002",
    "0006": "0002",
    "0008": "0002",
    "0010": "0002",
    "0004": "0004",
    "0005": "0005",
    "0007": "0007",
    "0009": "0009",
    "0011": "0011",
}
UPGRADE = "import sys; from service.db import migrations; migrations.upgrade(sys.argv[1])"
INSERT = "INSERT INTO bulk_loads (load_id, caller, method, options) VALUES (:name, 'ada', 'm', '')"
CREATE_KEY = "CREATE UNIQUE INDEX uq_bulk_loads_load_id_caller ON bulk_loads (load_id, caller)"
BUILDING = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CREATE UNIQUE INDEX%'")
IS_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'uq_bulk_loads_load_id_caller'::regclass"
INVALIDATE = """
    UPDATE pg_index SET indisvalid = false
    WHERE indexrelid = 'uq_bulk_loads_load_id_caller'::regclass
"""


@pytest.fixture
def url(empty_postgresql_url: str) -> str:
    """An empty database on PostgreSQL."""
    return empty_postgresql_url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, poolclass=NullPool)
    yield engine
    await engine.dispose()


@pytest.fixture
async def mortal() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that runs migrations and kills them."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MORTAL, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    yield process
    await process.communicate(b"")


async def is_killed(mortal: asyncio.subprocess.Process, url: str, revision: str, number: int) -> bool:
    """Migrate, and kill the process before this statement; return whether that was before the end."""
    assert mortal.stdin
    assert mortal.stdout
    mortal.stdin.write(f"{url} {revision} {number}\n".encode())
    status = int(await mortal.stdout.readline())
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.timeout(300)
async def test_killed_migration_can_be_run_again(
    mortal: asyncio.subprocess.Process, postgres: Postgres
) -> None:
    """Wherever it was killed, up and down, the next run completes; the old release can go on until then."""
    number, goes_on = 0, True
    while goes_on:
        number += STEP
        async with postgres.database() as url:
            engine = create_async_engine(url, poolclass=NullPool)
            await migrate_as_old_release(engine)
            await execute(engine, INSERT, name="nightly")

            goes_on = await is_killed(mortal, url, HEAD, number)
            revision = (await read_schema(engine)).revision
            assert revision
            assert await old_version(engine) == [OLD_VERSIONS[revision]]
            await upgrade(url)
            assert await read_schema(engine) == Schema(HEAD, "0003")

            goes_on |= await is_killed(mortal, url, "0002", number)
            await downgrade(url, "0002")
            assert (await read_schema(engine), await old_version(engine)) == (Schema("0002"), ["0002"])
            await engine.dispose()
    assert number > 15


async def test_killed_first_migration_can_be_run_again_on_sqlite(
    mortal: asyncio.subprocess.Process, tmp_path: Path
) -> None:
    """All migrations are one transaction there."""
    number, goes_on = 0, True
    while goes_on:
        number += STEP
        url = f"sqlite+aiosqlite:///{tmp_path}/{number}.db"
        goes_on = await is_killed(mortal, url, HEAD, number)
        engine = create_async_engine(url, poolclass=NullPool)
        assert (await read_schema(engine)).revision == (None if goes_on else HEAD)
        await upgrade(url)
        assert await read_schema(engine) == Schema(HEAD, "0003")
        await engine.dispose()
    assert number > 15


async def test_calls_go_on_while_a_migration_waits_for_a_lock(
    url: str, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """It gives up its place in the queue, names the session it waits for, and tries again."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0010")
    # As an interrupted run leaves it: only the ALTER TABLE is left.
    await execute(engine, CREATE_KEY)
    async with engine.connect() as report:
        await report.execute(text("SET application_name = 'report'"))
        await report.execute(text("SELECT * FROM bulk_loads"))
        with caplog.at_level(logging.WARNING):
            upgrading = asyncio.create_task(upgrade(url))
            calls = 0
            while "trying again in 2 s" not in caplog.text:
                async with asyncio.timeout(3):
                    await execute(engine, INSERT, name=f"load {calls}")
                calls += 1
        pid = await report.scalar(text("SELECT pg_backend_pid()"))
    await upgrading

    assert f"pid {pid} (role postgres, application 'report')" in caplog.text
    assert (await read_schema(engine)).revision == HEAD


async def test_writes_go_on_while_a_trigger_waits_for_its_table(
    url: str, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Each table is locked by itself. The next try does not lock those that have their triggers."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0006")
    user = "INSERT INTO users (email) VALUES (:name)"
    async with engine.connect() as load:
        await load.execute(text("LOCK TABLE posts IN ROW EXCLUSIVE MODE"))
        with caplog.at_level(logging.WARNING):
            upgrading = asyncio.create_task(upgrade(url, "0010"))
            calls = 0
            while "trying again in 1 s" not in caplog.text:
                async with asyncio.timeout(2):
                    await execute(engine, user, name=f"{calls}@example.org")
                    await execute(engine, "INSERT INTO posts (title, content, author_id) VALUES ('', '', 1)")
                calls += 1
        await execute(engine, user, name="logged@example.org")
        pid = await load.scalar(text("SELECT pg_backend_pid()"))
        await load.rollback()
        await load.execute(text("LOCK TABLE users IN ROW EXCLUSIVE MODE"))
        await upgrading
    assert f"pid {pid} " in caplog.text
    async with engine.connect() as connection:
        logged = await connection.scalar(text("SELECT count(*) FROM changes WHERE entity = 'users'"))
        assert logged
        assert await connection.scalar(text("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'log%'")) == 8


async def test_invalid_index_is_built_again(url: str, engine: AsyncEngine) -> None:
    """A run that was interrupted while it built one leaves it, and no insert looks at it."""
    await migrate_as_old_release(engine)
    await execute(engine, CREATE_KEY)
    await execute(engine, INVALIDATE)

    await upgrade(url)

    async with engine.connect() as connection:
        assert await connection.scalar(text(IS_VALID)) is True


async def test_index_waits_for_an_open_transaction(url: str, engine: AsyncEngine) -> None:
    """For longer than lock_timeout; a second migration that waits for the first does not block it."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0010")
    async with engine.connect() as writer, engine.connect() as observer:
        await writer.execute(text(INSERT), {"name": "nightly"})
        upgrades = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", UPGRADE, url) for _ in range(2)
        ]
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE :query AND {}"
        long = text(waiting.format("query_start < clock_timestamp() - interval '1.5 s'"))
        while not await observer.scalar(long, {"query": "CREATE UNIQUE INDEX CONCURRENTLY%"}):
            await observer.rollback()
        polling = text(waiting.format("true"))
        while not await observer.scalar(polling, {"query": "SELECT pg_try_advisory_lock%"}):
            await observer.rollback()
    assert [await process.wait() for process in upgrades] == [0, 0]

    assert (await read_schema(engine)).revision == HEAD


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_backfill_goes_on_where_it_was_interrupted(kind: str, url: str, tmp_path: Path) -> None:
    """It commits each batch on PostgreSQL, and leaves filled rows alone."""
    engine = create_async_engine(url if kind == "postgresql" else f"sqlite+aiosqlite:///{tmp_path}/x.db")
    await migrate_as_old_release(engine)
    for number in (1, 2, 3, 10, 1_000_000_000_000, 1_000_000_000_001):
        await execute(engine, f"INSERT INTO users (id, email) VALUES ({number}, '{number}@example.org')")
    await execute(engine, "UPDATE users SET full_name = 'filled before' WHERE id < 3")
    fill = "UPDATE users SET full_name = email WHERE id BETWEEN :first AND :last AND full_name IS NULL"

    def run(connection: Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)):
            ddl.backfill("users", fill, batch_rows=2)

    async with engine.connect() as connection:
        await connection.run_sync(run)
        await connection.commit()
        names = (await connection.scalars(text("SELECT full_name FROM users ORDER BY id"))).all()
    await engine.dispose()

    assert names[:3] == ["filled before", "filled before", "3@example.org"]
    assert names[3:] == [f"{number}@example.org" for number in (10, 1_000_000_000_000, 1_000_000_000_001)]


async def test_older_server_that_starts_during_a_contraction_stops_it(url: str, engine: AsyncEngine) -> None:
    """The version stays, and the next run completes."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0010")
    server = create_async_engine(
        url, poolclass=NullPool, connect_args={"server_settings": {"application_name": "roster"}}
    )
    async with engine.connect() as writer, engine.connect() as observer:
        await writer.execute(text(INSERT), {"name": "nightly"})
        upgrading = asyncio.create_task(upgrade(url))
        while not await observer.scalar(BUILDING):
            await observer.rollback()
        await observer.rollback()  # the index waits for open transactions
        async with server.connect():
            await writer.rollback()
            with pytest.raises(MigrationError, match="1 sessions with the application name 'roster'"):
                await upgrading

    assert (await read_schema(engine)).revision == "0010"
    await upgrade(url)
    assert (await read_schema(engine)).revision == HEAD
    await server.dispose()


async def test_later_version_table_of_another_application_is_left_alone(
    url: str, engine: AsyncEngine
) -> None:
    """Roster's own was dropped, and the other application made one."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0010")
    await execute(engine, "UPDATE alembic_version SET version_num = 'f00dcafe'")

    await upgrade(url)
    assert await old_version(engine) == ["f00dcafe"]
    await downgrade(url, "0002")
    assert await old_version(engine) == ["f00dcafe"]


async def test_waiting_migration_of_an_older_release_does_not_stop_a_contraction(
    url: str, engine: AsyncEngine
) -> None:
    """It waits for the lock in a transaction, which the index waits for; the lock is released for it."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0010")
    async with engine.connect() as writer, engine.connect() as observer:
        await writer.execute(text(INSERT), {"name": "nightly"})
        upgrading = asyncio.create_task(upgrade(url))
        while not await observer.scalar(BUILDING):
            await observer.rollback()
        await observer.rollback()

        async def migrate_old() -> None:
            async with engine.begin() as connection:
                # Otherwise PostgreSQL could end this one of the two.
                await connection.execute(text("SET LOCAL deadlock_timeout = '1 min'"))
                await connection.execute(text("SELECT pg_advisory_xact_lock(7238001)"))

        older = asyncio.create_task(migrate_old())
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while not await observer.scalar(waiting):
            await observer.rollback()
        await observer.rollback()
        await writer.rollback()
        await asyncio.gather(older, upgrading)
    assert (await read_schema(engine)).revision == HEAD


async def test_index_that_can_not_be_built_is_dropped(url: str, engine: AsyncEngine) -> None:
    """An invalid index of a unique key would still refuse rows of an older server."""
    await migrate_as_old_release(engine)
    await upgrade(url, "0010")
    await execute(engine, "ALTER TABLE bulk_loads DROP CONSTRAINT uq_bulk_loads_load_id")
    for _ in range(2):
        await execute(engine, INSERT, name="nightly")

    with pytest.raises(DBAPIError, match="could not create unique index"):
        await upgrade(url)
    async with engine.connect() as connection:
        indexes = await connection.scalars(text("SELECT relname FROM pg_class WHERE relname LIKE 'uq_bulk%'"))
        assert indexes.all() == []
