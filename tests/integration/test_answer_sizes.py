"""The size of a row as SQL computes it is at least its size in a response."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.message import Message
from sqlalchemy import insert, select

from roster.v1.resources_pb2 import Post as PostMessage, User as UserMessage
from service.db.base import ReadSession
from service.db.engine import Database
from service.db.selection import Selection
from service.posts.convert import post_to_fields, post_with_author_to_fields
from service.posts.model import Post
from service.posts.repository import BASIC, WITH_AUTHOR, PostRepository
from service.users.convert import user_with_posts_to_fields
from service.users.model import User
from service.users.newest_posts import NEWEST_POSTS
from service.users.repository import WITH_POSTS, UserRepository
from service.validation import MAX_ID

# What a message needs most bytes for: a negative number of seconds, all digits of a fraction, large ids.
LONG_AGO = datetime(1, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC)
LARGEST: dict[str, Any] = {"created_at": LONG_AGO, "updated_at": LONG_AGO, "version": 2**63 - 1}
FRAME_BYTES = 5  # tag and length, up to 4 MiB

texts = pytest.mark.parametrize("text", ["x", "x" * 255, "é" * 255, "\U0001f600" * 255])


async def fill(database: Database, text: str) -> None:
    """Store a user with these texts, and as many posts as a response has."""
    user = {"id": MAX_ID, "email": text, "full_name": text, **LARGEST}
    posts = [
        {"id": MAX_ID - i, "title": text, "content": text * 9, "author_id": MAX_ID, **LARGEST}
        for i in range(NEWEST_POSTS)
    ]
    async with database.begin() as session:
        await session.execute(insert(User), user)
        await session.execute(insert(Post), posts)


async def size(session: ReadSession, selection: Selection) -> int:
    assert selection.size is not None
    sizes = await session.scalars(select(selection.size).where(selection.model.id == MAX_ID))
    return sizes.one()


def framed(message: Message) -> int:
    return message.ByteSize() + FRAME_BYTES


@texts
async def test_user_with_posts_is_no_larger_than_its_size_in_sql(database: Database, text: str) -> None:
    """In any script, and for texts that are much shorter than the numbers."""
    await fill(database, text)
    async with database.read() as session:
        row: Any = await UserRepository(session).get(MAX_ID, WITH_POSTS)
        message = UserMessage(**user_with_posts_to_fields(row))
        assert len(message.posts) == NEWEST_POSTS
        assert framed(message) <= await size(session, WITH_POSTS)


@texts
@pytest.mark.parametrize(
    ("selection", "to_fields"),
    [(BASIC, post_to_fields), (WITH_AUTHOR, post_with_author_to_fields)],
    ids=["BASIC", "WITH_AUTHOR"],
)
async def test_post_is_no_larger_than_its_size_in_sql(
    database: Database, text: str, selection: Selection, to_fields: Callable[[Any], Any]
) -> None:
    """With its author and without."""
    await fill(database, text)
    async with database.read() as session:
        row = await PostRepository(session).get(MAX_ID, selection)
        message = PostMessage(**to_fields(row))
        assert message.HasField("author") == (selection is WITH_AUTHOR)
        assert framed(message) <= await size(session, selection)
