"""PostRepository: all SQL about posts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sqlalchemy import Text
from sqlalchemy.exc import IntegrityError

from service.db.base import BigInt, Session
from service.db.bulk.batch import Batch, Outcome, WriteOptions
from service.db.bulk.resolve import Key, resolve_creates, resolve_updates
from service.db.bulk.writer import FOR_UPDATE, BulkWriter, id_taken, stored
from service.db.dialect import matched
from service.db.repository import Repository, SessionT
from service.db.selection import Row, Selection, columns_by_name, readable_columns, size_of
from service.errors import AuthorNotFound, PostNotFound
from service.posts.model import Post
from service.users.model import User

AUTHOR = readable_columns(User)
# The largest author in an answer, rounded up.
AUTHOR_BYTES = 2200

# A post alone, and a post whose row goes on with the columns of its author.
BASIC = Selection(Post, readable_columns(Post), size=size_of(readable_columns(Post)))
WITH_AUTHOR = Selection(
    Post,
    [*BASIC.columns, *[column.label(f"author__{column.key}") for column in AUTHOR]],
    size=size_of(readable_columns(Post)) + AUTHOR_BYTES,
    join=Post.author,
)


class PostRepository(Repository[Post, SessionT]):
    """Posts."""

    model = Post
    not_found = PostNotFound
    filterable = columns_by_name(Post, "id", "title", "author_id", "created_at", "updated_at")
    sortable: ClassVar = {"id": [Post.id], "created_at": [Post.created_at, Post.id]}

    @classmethod
    def basic(cls) -> Selection:
        return BASIC

    async def create(self: "PostRepository[Session]", values: Mapping[str, Any]) -> Row:
        """Insert a post; raises AuthorNotFound."""
        try:
            return await super().create(values)
        except IntegrityError:
            raise author_not_found("author_id") from None

    async def create_many(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Insert the rows of a batch, whose authors are known by id or by e-mail."""
        writer = BulkWriter(self.session, Post)

        async def attempt(batch: Batch) -> Outcome:
            columns = dict(batch.columns)
            emails = columns.pop("author_email")
            columns["author_id"] = await self._author_ids(batch, columns["author_id"], emails)
            batch = replace(batch, columns=columns)
            keys = []
            if options.restores:
                asks = options.asks_first(batch)
                keys = [Key("id", await writer.ids_by(Post.id, batch) if asks else {}, id_taken)]
            creates = await resolve_creates(batch, keys, options.on_conflict)
            return await writer.create(batch, creates, options)

        return await writer.settled(batch, attempt)

    async def update_many(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Update the posts of a batch by id, in file order."""
        writer = BulkWriter(self.session, Post)

        async def attempt(batch: Batch) -> Outcome:
            if updated := await writer.update_unseen(batch, options):
                return updated
            ids = batch.take("id", batch.good_rows())
            rows = await stored(self.session, Post.id, ids, Post.version, lock=FOR_UPDATE)
            updates = await resolve_updates(batch, {row.id: row.version for row in rows}, self.missing)
            return await writer.update(batch, updates, options)

        return await writer.settled(batch, attempt)

    async def _author_ids(
        self, batch: Batch, ids: list[int | None], emails: list[str | None]
    ) -> list[int | None]:
        """Return the ids of the authors; fails the rows that have none.

        They are not locked, which the foreign key does in any case: one that is deleted in between
        is an IntegrityError.
        """
        good = batch.good_rows()
        by_id = [id for row in good if (id := ids[row])]
        by_email = [email for row in good if (email := emails[row])]
        known: dict[int | str | None, int | None] = {}
        known.update(zip(by_id, await matched(self.session, User.id, by_id, BigInt), strict=True))
        known.update(zip(by_email, await matched(self.session, User.email, by_email, Text()), strict=True))
        authors = [known.get(id or email) for id, email in zip(ids, emails, strict=True)]
        for position in good:
            if authors[position] is None:
                batch.fail(position, author_not_found("author_id" if ids[position] else "author_email"))
        return authors


def author_not_found(field: str) -> AuthorNotFound:
    """Return the error for a post whose author does not exist."""
    return AuthorNotFound("there is no user for this author", field=field)
