"""Windows of the change feed that take several pages, while others write."""

import asyncio

import pytest
from sqlalchemy import text, update

from roster.v1.changes_pb2 import Change, WatchChangesResponse
from service.changes import log
from service.changes.feed import Feed, RowTooLarge
from service.changes.kinds import ENTITIES
from service.changes.token import Token
from service.changes.watcher import Watches
from service.db.engine import Database
from service.db.selection import MAX_ROWS_BYTES
from service.posts.model import Post
from service.users.repository import UserRepository
from tests.support.rows import add_posts, add_users


async def create(database: Database, *names: str) -> None:
    """Create users, each in a transaction."""
    for name in names:
        async with database.begin() as session:
            await UserRepository(session).create({"email": f"{name}@example.org"})


async def window(database: Database, feed: Feed) -> tuple[Token, str]:
    """Return the token after the first of two changes, and the name in it."""
    token = (await feed.now()).for_entities(ENTITIES)
    await create(database, "ada", "bob")
    page = await feed.read(token, 1)
    assert page.has_more
    return page.token, page.changes[0].user.email


async def test_last_page_of_an_old_window_is_not_the_last_one(database: Database) -> None:
    """Changes since the window began follow it."""
    feed = Feed(database)
    token, first = await window(database, feed)
    await create(database, "cyd")

    found, has_more = [first], True
    while has_more:
        page = await feed.read(token, 1)
        found += [change.user.email for change in page.changes]
        token, has_more = page.token, page.has_more

    assert found == ["ada@example.org", "bob@example.org", "cyd@example.org"]


async def test_watch_from_within_a_window_misses_nothing(database: Database) -> None:
    """The polls of the process begin after changes that the window does not have."""
    feed = Feed(database)
    token, first = await window(database, feed)
    await create(database, "cyd")

    found, received = [first], asyncio.Event()

    async def receive(response: bytes, size: int) -> None:
        changes = WatchChangesResponse.FromString(response).changes
        assert len(changes) == size
        found.extend(change.user.email for change in changes)
        if len(found) == 3:
            received.set()

    watch = asyncio.create_task(Watches(feed).run(token, ENTITIES, receive))
    async with asyncio.timeout(20):
        await received.wait()
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)

    assert found == ["ada@example.org", "bob@example.org", "cyd@example.org"]


async def test_row_that_fits_no_response_is_an_error(database: Database) -> None:
    """The service writes none. Changes before it are sent, and those after it once it is shorter."""
    feed = Feed(database)
    token = (await feed.now()).for_entities(ENTITIES)
    [author] = await add_users(database)
    [large] = await add_posts(database, [author], content="x" * MAX_ROWS_BYTES)
    [small] = await add_posts(database, [author])

    page = await feed.read(token)
    assert [change.user.id for change in page.changes] == [author]
    with pytest.raises(RowTooLarge, match=f"row {large} of posts is larger than a response"):
        await feed.read(page.token)

    async with database.begin() as session:
        await session.execute(update(Post).where(Post.id == large).values(content="x"))
    assert {change.post.id for change in (await feed.read(page.token)).changes} == {large, small}


async def test_window_ends_after_some_entries_of_any_table(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of posts gets pages without changes, instead of reading the log of users in one statement."""
    for name in ("READ", "READ_FROM_SQLITE"):
        monkeypatch.setattr(log, name, getattr(log, name).replace(str(log.MAX_WINDOW), "2"))
    feed = Feed(database)
    token = (await feed.now()).for_entities([Change.POSTS])
    ids = [(await add_users(database, 1, email=f"{name}@example.org"))[0] for name in "abcdefg"]
    [post] = await add_posts(database, ids[:1])

    sizes, has_more = [], True
    while has_more:
        page = await feed.read(token)
        token, has_more = page.token, page.has_more
        sizes.append(len(page.changes))

    assert sizes[:2] == [0, 0]
    assert (sum(sizes), [change.post.id for change in page.changes]) == (1, [post])


async def test_changed_id_is_a_deletion_and_a_new_row(database: Database) -> None:
    """Nothing in the service changes an id, but somebody may do so by hand."""
    feed = Feed(database)
    await feed.now()
    await create(database, "ada")
    token = (await feed.now()).for_entities(ENTITIES)
    async with database.begin() as session:
        await session.execute(text("UPDATE users SET id = 7"))

    page = await feed.read(token)

    assert [(change.user.id, change.deleted_user_id) for change in page.changes] == [(7, 0), (0, 1)]
