"""Users with their newest posts, without the contents of these."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import aliased

from service.db.base import BigInt, Expression, ReadSession, column_names
from service.db.deletion import count_referring
from service.db.dialect import any_of, values_table
from service.db.selection import FIXED_BYTES, MAX_ROWS_BYTES, Row, readable_columns, size_of
from service.posts.model import Post
from service.timeslice import TimeSlice, map_in_slices
from service.users.model import User

NEWEST_POSTS = 50
POSTS_AT_ONCE = 500
# Of several authors together, read with one statement to take the newest of each.
MAX_POSTS_OF_GROUP = 1000
LISTED_POST = tuple(name for name in column_names(Post) if name != "content")
LISTED_POST_COLUMNS = [column for column in readable_columns(Post) if column.key in LISTED_POST]


class UserWithPosts(NamedTuple):
    """A user and the newest posts, without their contents."""

    user: Row
    posts: Sequence[Row]


async def add_newest_posts(session: ReadSession, rows: Sequence[Row]) -> Sequence[UserWithPosts]:
    """Read the newest posts of users, and return both."""
    posts = await _newest_posts(session, [row.id for row in rows])
    return await map_in_slices(lambda row: UserWithPosts(row, posts.get(row.id, [])), rows)


def size_with_posts() -> ColumnElement[int]:
    """Return the SQL for the bytes of a user and the newest posts in an answer, rounded up."""
    posts = select(func.coalesce(func.sum(size_of(LISTED_POST_COLUMNS)), 0)).where(_is_newest_of(User.id))
    return size_of(readable_columns(User)) + posts.correlate(User).scalar_subquery()


async def _newest_posts(session: ReadSession, author_ids: list[int]) -> dict[int, list[Row]]:
    """Return posts by author; a page can have 50,000 of them."""
    authors = values_table(session, author_ids, BigInt)
    newest = (
        select(*LISTED_POST_COLUMNS)
        .join_from(Post, authors, _is_newest_of(authors.c.value))
        .order_by(Post.author_id, Post.id.desc())
    )
    connection = await session.connection()
    found = (await connection.execute(newest)).partitions(POSTS_AT_ONCE)
    posts: dict[int, list[Row]] = defaultdict(list)
    time_slice = TimeSlice()
    for some in found:
        for post in some:
            posts[post.author_id].append(post)
        await time_slice.pause()
    return posts


def _is_newest_of(author_id: Expression) -> ColumnElement[bool]:
    # One step on the index for each author finds the first of the newest posts; a window over all posts would
    # read all of them.
    newest = aliased(Post)
    first = (
        select(newest.id)
        .where(newest.author_id == author_id)
        .order_by(newest.id.desc())
        .offset(NEWEST_POSTS - 1)
        .limit(1)
        .correlate_except(newest)
        .scalar_subquery()
    )
    return and_(Post.author_id == author_id, Post.id >= func.coalesce(first, 0))


async def add_newest_posts_of_shards(session: ReadSession, rows: Sequence[Row]) -> Sequence[UserWithPosts]:
    """Read the newest posts of users, if these are distributed; return as many of both as fit an answer.

    Citus has no statement that takes the first posts of each of several authors without sending all of them
    to the coordinator. So the posts are counted first. Authors with few of them share a statement.
    """
    author_ids = [row.id for row in rows]
    counts = await count_referring(session, Post.author_id, author_ids) if len(rows) > 1 else Counter[int]()
    found: list[UserWithPosts] = []
    size = 0
    for group in _groups(rows, counts):
        posts = await _posts_of_group(session, [row.id for row in group])
        for row in group:
            user = UserWithPosts(row, posts.get(row.id, []))
            size += _bytes_of(user)
            if size > MAX_ROWS_BYTES:
                return found
            found.append(user)
    return found


def _groups(rows: Sequence[Row], counts: Counter[int]) -> Iterator[Sequence[Row]]:
    """Yield the users in their order: those together that have at most 1000 posts, the others alone."""
    group: list[Row] = []
    total = 0
    for row in rows:
        if group and total + counts[row.id] > MAX_POSTS_OF_GROUP:
            yield group
            group, total = [], 0
        group.append(row)
        total += counts[row.id]
    if group:
        yield group


async def _posts_of_group(session: ReadSession, author_ids: Sequence[int]) -> dict[int, list[Row]]:
    newest = (
        select(*LISTED_POST_COLUMNS)
        .where(any_of(Post.author_id, author_ids))
        .order_by(Post.author_id, Post.id.desc())
        .limit(NEWEST_POSTS if len(author_ids) == 1 else None)
    )
    connection = await session.connection()
    posts: dict[int, list[Row]] = defaultdict(list)
    for post in (await connection.execute(newest)).all():
        if len(posts[post.author_id]) < NEWEST_POSTS:
            posts[post.author_id].append(post)
    return posts


def _bytes_of(found: UserWithPosts) -> int:
    texts = [value for row in (found.user, *found.posts) for value in row if isinstance(value, str)]
    return FIXED_BYTES * (1 + len(found.posts)) + sum(len(text.encode()) for text in texts)
