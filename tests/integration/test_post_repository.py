"""What only the repository of posts does."""

import pytest
from sqlalchemy.exc import InvalidRequestError

from service.db.engine import Database
from service.db.paging import Keyset
from service.db.repository import MAX_ROWS_BYTES
from service.errors import AuthorNotFound
from service.posts.repository import SORTABLE, PostRepository
from service.users.repository import UserRepository
from tests.rows import add_posts, add_users

MIB = 1 << 20


async def test_a_post_needs_an_author(database: Database) -> None:
    """One by nobody is refused, and the error names the field."""
    with pytest.raises(AuthorNotFound) as caught:
        async with database.begin() as session:
            await PostRepository(session).create({"title": "Notes", "content": "", "author_id": 4711})

    assert caught.value.field == "author_id"


async def test_the_author_of_a_deleted_user_s_post_is_nobody(database: Database) -> None:
    """The id of a user who is gone takes no new posts."""
    (ada,) = await add_users(database)
    async with database.begin() as session:
        await UserRepository(session).delete(ada)

    with pytest.raises(AuthorNotFound):
        async with database.begin() as session:
            await PostRepository(session).create({"title": "Notes", "content": "", "author_id": ada})


async def test_the_author_does_not_come_along_unless_asked_for(database: Database) -> None:
    """A lazy load would be a statement a row: it raises."""
    (id,) = await add_posts(database, await add_users(database))

    async with database.read() as session:
        post = await PostRepository(session).get(id)
        with pytest.raises(InvalidRequestError, match=r"Post\.author"):
            _ = post.author


async def test_a_post_comes_with_its_author(database: Database) -> None:
    """In each way of reading posts."""
    ada, alan = await add_users(database, 2)
    ids = await add_posts(database, [ada, alan])

    async with database.read() as session:
        posts = PostRepository(session, with_author=True)
        read = [
            [await posts.get(id) for id in ids],
            [post for post in await posts.get_many(ids) if post],
            (await posts.list(limit=10)).rows,
        ]
    for found in read:
        assert [(post.author.id, post.author.email) for post in found] == [
            (ada, "user0@example.org"),
            (alan, "user1@example.org"),
        ]


@pytest.mark.parametrize("with_author", [False, True])
async def test_many_posts_end_where_the_answer_would_be_too_large(
    database: Database, with_author: bool
) -> None:
    """What is answered is the longest prefix that fits, missing ids included; the rest is asked for again."""
    author_ids = await add_users(database)
    ids = await add_posts(database, author_ids * 8, content="x" * (MIB - 8000))
    asked = [4711, *ids[::-1], 4712]

    answers = []
    async with database.read() as session:
        posts = PostRepository(session, with_author=with_author)
        while asked:
            found = await posts.get_many(asked)
            answers.append([post.id if post else None for post in found])
            asked = asked[len(found) :]
    assert answers == [[None, *ids[:4:-1]], ids[4:1:-1], [*ids[1::-1], None]]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("field", list(SORTABLE))
async def test_a_page_ends_where_the_answer_would_be_too_large(
    database: Database, field: str, descending: bool
) -> None:
    """Pages of large posts are short, and the walk over them meets every row once."""
    author_ids = await add_users(database)
    large = await add_posts(database, author_ids * 7, content="x" * (MIB - 8000))
    small = await add_posts(database, author_ids * 7)
    keyset = Keyset(SORTABLE[field], descending)

    pages = []
    async with database.read() as session:
        page = await PostRepository(session).list(keyset=keyset, limit=5)
        pages.append([post.id for post in page.rows])
        while page.next_key:
            page = await PostRepository(session).list(keyset=keyset, after=page.next_key, limit=5)
            pages.append([post.id for post in page.rows])
    if descending:
        assert pages == [small[:1:-1], [*small[1::-1], *large[:3:-1]], large[3:0:-1], large[:1]]
    else:
        assert pages == [large[:3], large[3:6], [large[6], *small[:4]], small[4:]]


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
async def test_sizes_are_those_of_utf_8(database: Database, letter: str) -> None:
    """Three contents of 1 MiB and their titles are too much, whatever they are written in."""
    author_ids = await add_users(database)
    content = letter * (MIB // len(letter.encode()))
    await add_posts(database, author_ids * 3, content=content)

    async with database.read() as session:
        page = await PostRepository(session).list(limit=3)
    assert len(page.rows) == 2
    assert sum(len(post.content.encode()) for post in page.rows) < MAX_ROWS_BYTES
