"""Old entries of the log of changes are deleted by xid: no valid token misses one."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from roster.errors import TokenExpired
from service.changes.feed import Feed
from service.changes.kinds import ENTITIES
from service.changes.prune import prune_changes
from service.db.engine import Database
from service.settings import Settings
from tests.support.rival import rival
from tests.support.rows import add_users

SOON = timedelta(minutes=1)


async def entries(database: Database) -> int:
    """Return the number of entries in the log."""
    async with database.read() as session:
        return int(await session.scalar(text("SELECT count(*) FROM changes")) or 0)


@pytest.fixture
def feed(database: Database) -> Feed:
    """The feed of the database."""
    return Feed(database)


async def test_token_expires_with_the_first_change_that_it_lacks(
    database: Database, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are small here: three changes take several."""
    monkeypatch.setattr("service.changes.prune.BATCH_ENTRIES", 2)
    before = (await feed.now()).for_entities(ENTITIES)
    for name in ("ada", "bob", "cyd"):
        await add_users(database, email=f"{name}@example.org")
    after = (await feed.now()).for_entities(ENTITIES)

    await prune_changes(database, datetime.now(UTC) + SOON)

    assert await entries(database) == 0
    with pytest.raises(TokenExpired):
        await feed.read(before)
    assert (await feed.read(after)).changes == []


async def test_keeps_what_is_not_old(database: Database, feed: Feed) -> None:
    before = (await feed.now()).for_entities(ENTITIES)
    await add_users(database)
    await prune_changes(database, datetime.now(UTC) - SOON)
    assert len((await feed.read(before)).changes) == 1


async def test_tokens_made_while_an_old_transaction_is_open_stay_valid(postgresql_url: str) -> None:
    """It may still write entries with its low xid, so nothing above that is deleted."""
    database = Database(Settings(database_url=postgresql_url))
    feed = Feed(database)
    await feed.now()  # the first read begins the feed
    async with rival(postgresql_url) as old:
        await old.execute("SELECT pg_current_xact_id()")
        await add_users(database)
        token = (await feed.now()).for_entities(ENTITIES)  # as old as that transaction
        await prune_changes(database, datetime.now(UTC) + SOON)
        assert await entries(database) == 1
        await old.execute("INSERT INTO users (email) VALUES ('old@example.org')")
        await old.commit()
    [change] = (await feed.read(token)).changes
    assert change.user.email == "old@example.org"
    await prune_changes(database, datetime.now(UTC) + SOON)
    assert await entries(database) == 0
    with pytest.raises(TokenExpired):
        await feed.read(token)
    await database.close()


async def test_one_server_prunes_at_a_time(postgresql_url: str) -> None:
    """Another one does not wait for it."""
    database = Database(Settings(database_url=postgresql_url))
    await add_users(database)
    async with rival(postgresql_url) as pruning:
        await pruning.execute("SELECT 1 FROM feed FOR UPDATE")
        await prune_changes(database, datetime.now(UTC) + SOON)
        assert await entries(database) == 1
    await database.close()
