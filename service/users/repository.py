"""UserRepository: all SQL about users."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased
from sqlalchemy.orm.attributes import set_committed_value

from service.db.base import BigInt
from service.db.bulk.table import BulkTable, UniqueKey
from service.db.dialect import insert, listed, octets
from service.db.paging import Page
from service.db.repository import Repository, shown
from service.errors import EmailTaken, UserNotFound
from service.posts.model import Post
from service.timeslice import MESSAGES, TimeSlice, slices
from service.users.model import User

NEWEST_POSTS = 50
POSTS_AT_ONCE = 500
LISTED_POST = [column for column in shown(Post) if column.key != "content"]
# What a message has beside its texts: tags, lengths, ids, times; rounded up.
FIXED_BYTES = 100

FILTERABLE: dict[str, Any] = {
    name: getattr(User, name)
    for name in ("id", "email", "full_name", "is_active", "created_at", "updated_at")
}
SORTABLE: dict[str, list[Any]] = {
    "id": [User.id],
    "email": [User.email],
    "created_at": [User.created_at, User.id],
}


class UserRepository(Repository[User]):
    """Users, where wanted with their newest 50 posts (without contents)."""

    model = User
    not_found = UserNotFound

    def __init__(self, session: AsyncSession, *, with_posts: bool = False) -> None:
        super().__init__(session)
        self.with_posts = with_posts
        if with_posts:
            self.size = _size_with_posts()

    async def get_by_email(self, email: str) -> User:
        """Return the user with this normalised e-mail; raises UserNotFound."""
        return await self.get_by(User.email == email)

    async def list_active(self, *, after: Sequence[Any] | None = None, limit: int) -> Page[User]:
        """Return a page of the active users, in id order."""
        return await self.list(User.is_active, after=after, limit=limit)

    async def create(self, values: Mapping[str, Any]) -> User:
        """Insert a user; raises EmailTaken with the `existing_id`."""
        statement = insert(self.session, User).values(**values).on_conflict_do_nothing().returning(User)
        created: User | None = await self.session.scalar(statement)
        if created is None:
            raise email_taken(await self._id_by_email(values["email"]))
        return created

    async def update(self, id: int, changes: Mapping[str, Any], version: int = 0) -> User:
        """Change a user; raises as the base does, and EmailTaken."""
        if "email" in changes:
            owner = await self._id_by_email(changes["email"])
            if owner not in (None, id):
                raise email_taken(owner)
        try:
            return await super().update(id, changes, version)
        except IntegrityError:  # somebody took it in between
            raise email_taken(None) from None

    async def replace_hash(self, id: int, old: str, new: str) -> None:
        """Store a stronger hash of the same password, unless the password was changed meanwhile."""
        await self.session.execute(
            update(User)
            .where(User.id == id, User.hashed_password == old)
            .values(hashed_password=new)
            .execution_options(synchronize_session=False)
        )

    async def _id_by_email(self, email: str) -> int | None:
        return await self.session.scalar(select(User.id).where(User.email == email))

    async def _complete(self, rows: Sequence[User]) -> None:
        if not self.with_posts or not rows:
            return
        await asyncio.sleep(0)  # 1,000 entities were made just now
        posts = await self._newest_posts([row.id for row in rows])
        async for some in slices(rows, MESSAGES):
            for row in some:
                set_committed_value(row, "posts", posts.get(row.id, []))

    async def _newest_posts(self, author_ids: list[int]) -> dict[int, list[Any]]:
        """Return posts by author, as rows of columns: a page may have 30,000, and an entity takes 15 µs."""
        authors = listed(self.session, author_ids, BigInt)
        newest = (
            select(*LISTED_POST)
            .join_from(Post, authors, _is_newest_of(authors.c.value))
            .order_by(Post.author_id, Post.id.desc())
        )
        connection = await self.session.connection()
        found = (await connection.execute(newest)).partitions(POSTS_AT_ONCE)
        posts: dict[int, list[Any]] = defaultdict(list)
        time_slice = TimeSlice()
        for some in found:
            for post in some:
                posts[post.author_id].append(post)
            await time_slice.pause()
        return posts


def email_taken(existing_id: int | None) -> EmailTaken:
    """Return the error for an e-mail that belongs to another user."""
    facts = {"existing_id": existing_id} if existing_id else {}
    return EmailTaken("email belongs to another user", field="email", **facts)


USERS = BulkTable(
    User,
    UserRepository.missing,
    unique=[UniqueKey(User.email, email_taken)],
    sort_by=User.email,
)


def _size_with_posts() -> ColumnElement[int]:
    posts = select(func.coalesce(func.sum(octets(Post.title) + FIXED_BYTES), 0)).where(_is_newest_of(User.id))
    user = octets(User.email) + func.coalesce(octets(User.full_name), 0) + FIXED_BYTES
    return user + posts.correlate(User).scalar_subquery()


def _is_newest_of(author_id: Any) -> Any:
    # Where the newest 50 begin is one step on the index for each author; numbering all posts is not.
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
    return (Post.author_id == author_id) & (Post.id >= func.coalesce(first, 0))
