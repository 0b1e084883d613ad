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
from service.db.bulk.batch import Batch, OnConflict, Outcome, WriteOptions
from service.db.bulk.resolve import Key, resolve_creates, resolve_updates
from service.db.bulk.writer import FOR_UPDATE, BulkWriter, id_taken, stored
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

    async def create_many(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Insert the rows of a batch; those whose e-mail is taken fail, are skipped, or update its user."""
        writer = BulkWriter(self.session, User)

        async def attempt(batch: Batch) -> Outcome:
            asks = options.asks_first(batch)
            lock = FOR_UPDATE if options.on_conflict is OnConflict.UPDATE else None
            keys = [Key("email", await writer.ids_by(User.email, batch, lock) if asks else {}, email_taken)]
            if options.restores:
                keys.insert(0, Key("id", await writer.ids_by(User.id, batch) if asks else {}, id_taken))
            creates = await resolve_creates(batch, keys, options.on_conflict)
            return await writer.create(batch, creates, options, sort_key="email")

        return await writer.settled(batch, attempt)

    async def update_many(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Update the users of a batch by id, in file order."""
        writer = BulkWriter(self.session, User)

        async def attempt(batch: Batch) -> Outcome:
            if updated := await writer.update_unseen(batch, options):
                return updated
            ids = batch.take("id", batch.good_rows())
            rows = await stored(self.session, User.id, ids, User.version, User.email, lock=FOR_UPDATE)
            owners = await self._owners(batch, {row.id: row.email for row in rows}, options)
            updates = await resolve_updates(
                batch, {row.id: row.version for row in rows}, self.missing, owners.refusal
            )
            return await writer.update(batch, updates, options, moved="email" if owners.moved else None)

        return await writer.settled(batch, attempt)

    async def _owners(self, batch: Batch, emails: dict[int, str], options: WriteOptions) -> "_Owners":
        wanted = batch.take("email", batch.good_rows()) if "email" in options.update_fields else []
        taken = await stored(self.session, User.email, wanted, User.id)
        return _Owners(batch if wanted else None, emails, {row.email: row.id for row in taken})

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


class _Owners:
    """Who has which e-mail while the rows of a batch are applied one after the other."""

    def __init__(self, batch: Batch | None, emails: dict[int, str], taken: Mapping[str, int]) -> None:
        self.wanted = batch.columns["email"] if batch else None
        self.emails = dict(emails)
        self.owners: dict[str, int | None] = {**taken, **{email: id for id, email in emails.items()}}
        self.moved = False  # an e-mail went from one user of the batch to another

    def refusal(self, row: int, id: int) -> EmailTaken | None:
        """Return why the row can't have the e-mail it wants; otherwise note that it has it."""
        if self.wanted is None:
            return None
        email, was = self.wanted[row], self.emails[id]
        owner = self.owners.get(email)
        if owner not in (None, id):
            return email_taken(owner)
        if email != was:
            self.moved = self.moved or email in self.owners
            self.owners[was] = None
            self.owners[email] = id
            self.emails[id] = email
        return None


def email_taken(existing_id: int | None) -> EmailTaken:
    """Return the error for an e-mail that belongs to another user."""
    facts = {"existing_id": existing_id} if existing_id else {}
    return EmailTaken("email belongs to another user", field="email", **facts)


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
