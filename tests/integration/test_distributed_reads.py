"""Reads of posts that Citus distributes, on PostgreSQL and, with `make test-citus`, on a cluster."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import update

from service.db.engine import Database
from service.db.export import export_pages
from service.db.paging import ListQuery
from service.db.selection import MAX_ROWS_BYTES
from service.posts.model import Post
from service.posts.repository import PostRepository
from service.settings import Settings
from service.users.newest_posts import NEWEST_POSTS
from service.users.repository import WITH_POSTS, UserRepository
from tests.support.rows import add_posts, add_users

LIMIT = 10


@pytest.fixture
async def database(distributed_url: str) -> AsyncIterator[Database]:
    """A database whose posts are distributed."""
    database = Database(Settings(database_url=distributed_url))
    await database.ping()
    yield database
    await database.close()


async def exported(database: Database, filter_text: str = "") -> list[list[int]]:
    """Return the ids of each page of an export."""
    conditions = await PostRepository.conditions(filter_text)
    pages = export_pages(database, PostRepository, conditions, LIMIT, None)
    found, page = [], await pages.read(0)
    while page.rows:
        found.append([post.id for post in page.rows])
        page = await pages.read(page.next_key[0] if page.next_key else found[-1][-1])
    return found


async def test_export_crosses_gaps_between_ids(database: Database) -> None:
    """A few deleted posts, and the distance to a restored one, make no difference."""
    ada, *_ = await add_users(database)
    ids = await add_posts(database, [ada] * 95)
    far = [1 << 40, (1 << 53) - 1]
    async with database.begin() as session:
        for id in ids[30:60]:
            await PostRepository(session).delete(id)
    for id in far:
        await add_posts(database, [ada], id=id)

    pages = await exported(database)

    assert [id for page in pages for id in page] == [*ids[:30], *ids[60:], *far]
    assert max(map(len, pages)) == LIMIT


async def test_export_of_few_matching_rows_reads_larger_ranges(database: Database) -> None:
    """Otherwise there would be a statement for every ten posts."""
    ada, *_ = await add_users(database)
    ids = await add_posts(database, [ada] * 400)
    rare = ids[::5]
    async with database.begin() as session:
        await session.execute(update(Post).where(Post.id.in_(rare)).values(title="rare"))

    pages = await exported(database, 'title = "rare"')

    assert [id for page in pages for id in page] == rare
    assert len(pages) < 20


async def test_page_of_users_ends_before_their_posts_are_too_large(database: Database) -> None:
    """The next page begins with the first user who did not fit."""
    authors = await add_users(database, 80)
    for author in authors:
        await add_posts(database, [author] * NEWEST_POSTS, title="\N{GRINNING FACE}" * 250)

    async with database.read() as session:
        users = UserRepository(session)
        first = await users.page(ListQuery([], users.by_id(), None, len(authors)), WITH_POSTS)
        many = await users.get_many([*authors[:3], 4711, *authors[3:], 4712], WITH_POSTS)
    fitting = len(first.rows)
    assert 0 < fitting < len(authors)
    assert first.next_key == [authors[fitting - 1]]
    assert MAX_ROWS_BYTES * 0.9 < fitting * NEWEST_POSTS * 1100 < MAX_ROWS_BYTES * 1.1
    assert [found and found.user.id for found in many] == [*authors[:3], None, *authors[3:fitting]]
