"""Positions of the feed after a crash of PostgreSQL, which then gives xids again that were not durable."""

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest

from service.changes.feed import Feed
from service.changes.kinds import ENTITIES
from service.db import migrations
from service.db.engine import Database
from service.settings import Settings
from tests.support.postgres import PostgresServer
from tests.support.rows import add_users

UNDONE = 3
ATTEMPTS = 5  # the log writer may have written the end of the transactions before the crash


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server to crash. What was not committed reaches its log as late as possible."""
    with PostgresServer() as postgres:
        postgres.configure(wal_writer_delay="10s")
        postgres.reload()
        yield postgres


async def test_changes_with_xids_given_again_are_reported(mortal_postgres: PostgresServer) -> None:
    """The token was made after transactions that left nothing in the write-ahead log."""
    async with mortal_postgres.database() as url:
        await asyncio.to_thread(migrations.upgrade, url)
        database = Database(Settings(database_url=url))
        feed = Feed(database)
        await feed.now()  # begins the feed of this database
        for attempt in range(ATTEMPTS):
            await add_users(database, email=f"ada{attempt}@example.org")
            undone = [await undone_xid(url) for _ in range(UNDONE)]
            token = (await feed.now()).for_entities(ENTITIES)

            await asyncio.to_thread(mortal_postgres.stop, "immediate")
            await asyncio.to_thread(mortal_postgres.start)

            names = [f"bob{attempt}-{number}@example.org" for number in range(UNDONE)]
            for name in names:
                await add_users(database, email=name)
            assert [change.user.email for change in (await feed.read(token)).changes] == names
            if await undone_xid(url) <= max(undone) + 1:
                break
        else:
            pytest.fail("no xids were given again")
        await database.close()


async def undone_xid(url: str) -> int:
    """Return the xid of a transaction that is rolled back."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute("BEGIN")
        xid = await connection.fetchval("SELECT pg_current_xact_id()::text")
        await connection.execute("ROLLBACK")
        return int(xid)
    finally:
        await connection.close()
