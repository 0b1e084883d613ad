"""The size that SQL gives a row is never less than what the row takes in an answer."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.message import Message
from sqlalchemy import insert, select

from service.db.engine import Database
from service.posts.convert import post_to_message
from service.posts.model import Post
from service.posts.repository import PostRepository
from service.users.convert import user_to_message
from service.users.model import User
from service.users.repository import NEWEST_POSTS, UserRepository
from service.validation import MAX_ID

# What a message needs most bytes for: a negative number of seconds, all digits of a fraction, large ids.
LONG_AGO = datetime(1, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC)
LARGEST: dict[str, Any] = {"created_at": LONG_AGO, "updated_at": LONG_AGO, "version": 2**63 - 1}
FRAME_BYTES = 5  # tag and length, up to 4 MiB

texts = pytest.mark.parametrize("text", ["x", "x" * 255, "é" * 255, "\U0001f600" * 255])


async def fill(database: Database, text: str) -> None:
    """Store a user whose texts are these, with as many posts as an answer has."""
    user = {"id": MAX_ID, "email": text, "full_name": text, **LARGEST}
    posts = [
        {"id": MAX_ID - i, "title": text, "content": text * 9, "author_id": MAX_ID, **LARGEST}
        for i in range(NEWEST_POSTS)
    ]
    async with database.begin() as session:
        await session.execute(insert(User), user)
        await session.execute(insert(Post), posts)


async def size(repository: UserRepository | PostRepository) -> int:
    assert repository.size is not None
    sizes = await repository.session.scalars(select(repository.size).where(repository.model.id == MAX_ID))
    return sizes.one()


def framed(message: Message) -> int:
    return message.ByteSize() + FRAME_BYTES


@texts
async def test_a_user_with_posts_takes_no_more_than_sql_says(database: Database, text: str) -> None:
    """Whatever the texts are written in, and where they are nearly nothing beside the numbers."""
    await fill(database, text)
    async with database.read() as session:
        users = UserRepository(session, with_posts=True)
        message = user_to_message(await users.get(MAX_ID), with_posts=True)
        assert len(message.posts) == NEWEST_POSTS
        assert framed(message) <= await size(users)


@texts
@pytest.mark.parametrize("with_author", [False, True])
async def test_a_post_takes_no_more_than_sql_says(database: Database, text: str, with_author: bool) -> None:
    """With its author and without."""
    await fill(database, text)
    async with database.read() as session:
        posts = PostRepository(session, with_author=with_author)
        message = post_to_message(await posts.get(MAX_ID), with_author=with_author)
        assert message.HasField("author") == with_author
        assert framed(message) <= await size(posts)
