"""The reads and writes that only posts have."""

import pytest

from roster.errors import AuthorNotFound
from service.db.engine import Database
from service.db.paging import Keyset, ListQuery
from service.db.selection import MAX_ROWS_BYTES, Selection
from service.posts.repository import BASIC, WITH_AUTHOR, PostRepository
from service.users.repository import UserRepository
from tests.support.rows import add_posts, add_users

MIB = 1 << 20
SORTABLE = PostRepository.sortable
BY_ID = PostRepository.by_id()


async def test_post_needs_an_author(database: Database) -> None:
    """A post without one is refused, and the error names the field."""
    with pytest.raises(AuthorNotFound) as caught:
        async with database.begin() as session:
            await PostRepository(session).create({"title": "Notes", "content": "", "author_id": 4711})

    assert caught.value.field == "author_id"


async def test_deleted_users_cannot_be_authors(database: Database) -> None:
    """The error is the same as for an unknown id."""
    (ada,) = await add_users(database)
    async with database.begin() as session:
        await UserRepository(session).delete(ada)

    with pytest.raises(AuthorNotFound):
        async with database.begin() as session:
            await PostRepository(session).create({"title": "Notes", "content": "", "author_id": ada})


async def test_posts_are_read_with_their_authors(database: Database) -> None:
    """By each kind of read."""
    ada, alan = await add_users(database, 2)
    ids = await add_posts(database, [ada, alan])

    async with database.read() as session:
        posts = PostRepository(session)
        read = [
            [await posts.get(id, WITH_AUTHOR) for id in ids],
            [post for post in await posts.get_many([ids[0], 4711, ids[1]], WITH_AUTHOR) if post],
            (await posts.page(ListQuery([], BY_ID, None, 10), WITH_AUTHOR)).rows,
        ]
    for found in read:
        assert [(post.author__id, post.author__email) for post in found] == [
            (ada, "user0@example.org"),
            (alan, "user1@example.org"),
        ]


@pytest.mark.parametrize("selection", [BASIC, WITH_AUTHOR], ids=["BASIC", "WITH_AUTHOR"])
async def test_get_many_ends_before_the_response_is_too_large(
    database: Database, selection: Selection
) -> None:
    """The result is the longest prefix that fits, missing ids included."""
    author_ids = await add_users(database)
    ids = await add_posts(database, author_ids * 8, content="x" * (MIB - 8000))
    asked = [4711, *ids[::-1], 4712]

    answers = []
    async with database.read() as session:
        posts = PostRepository(session)
        while asked:
            found = await posts.get_many(asked, selection)
            answers.append([post.id if post else None for post in found])
            asked = asked[len(found) :]
    assert answers == [[None, *ids[:4:-1]], ids[4:1:-1], [*ids[1::-1], None]]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("field", list(SORTABLE))
async def test_page_ends_before_the_response_is_too_large(
    database: Database, field: str, descending: bool
) -> None:
    """Pages of large posts are short, and every row is on one page."""
    author_ids = await add_users(database)
    large = await add_posts(database, author_ids * 7, content="x" * (MIB - 8000))
    small = await add_posts(database, author_ids * 7)
    keyset = Keyset(SORTABLE[field], descending)

    pages = []
    async with database.read() as session:
        page = await PostRepository(session).page(ListQuery([], keyset, None, 5))
        pages.append([post.id for post in page.rows])
        while page.next_key:
            page = await PostRepository(session).page(ListQuery([], keyset, page.next_key, 5))
            pages.append([post.id for post in page.rows])
    if descending:
        assert pages == [small[:1:-1], [*small[1::-1], *large[:3:-1]], large[3:0:-1], large[:1]]
    else:
        assert pages == [large[:3], large[3:6], [large[6], *small[:4]], small[4:]]


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
async def test_sizes_are_in_bytes_of_utf_8(database: Database, letter: str) -> None:
    """Three contents of 1 MiB are too large for one answer, in any script."""
    author_ids = await add_users(database)
    content = letter * (MIB // len(letter.encode()))
    await add_posts(database, author_ids * 3, content=content)

    async with database.read() as session:
        page = await PostRepository(session).page(ListQuery([], BY_ID, None, 3))
    assert len(page.rows) == 2
    assert sum(len(post.content.encode()) for post in page.rows) < MAX_ROWS_BYTES
