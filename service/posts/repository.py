"""PostRepository: all SQL about posts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload

from service.db.base import BigInt
from service.db.bulk.batch import Batch
from service.db.bulk.table import BulkTable
from service.db.dialect import matched, octets
from service.db.repository import Repository
from service.errors import AuthorNotFound, PostNotFound
from service.posts.model import Post
from service.users.model import User

# What a message has beside its texts, and the largest author: rounded up.
FIXED_BYTES = 100
AUTHOR_BYTES = 2200

FILTERABLE: dict[str, Any] = {
    name: getattr(Post, name) for name in ("id", "title", "author_id", "created_at", "updated_at")
}
SORTABLE: dict[str, list[Any]] = {"id": [Post.id], "created_at": [Post.created_at, Post.id]}


class PostRepository(Repository[Post]):
    """Posts, where wanted with their authors."""

    model = Post
    not_found = PostNotFound

    def __init__(self, session: AsyncSession, *, with_author: bool = False) -> None:
        super().__init__(session)
        self.size = octets(Post.title) + octets(Post.content) + FIXED_BYTES
        if with_author:
            self.options = (joinedload(Post.author),)
            self.size = self.size + AUTHOR_BYTES

    async def create(self, values: Mapping[str, Any]) -> Post:
        """Insert a post; raises AuthorNotFound."""
        try:
            return await super().create(values)
        except IntegrityError:
            raise author_not_found("author_id") from None


async def resolve_authors(session: AsyncSession, batch: Batch) -> Batch:
    """Return new posts with the ids of their authors, who are given by id or e-mail; fail posts without one.

    The authors are not locked. If one is deleted meanwhile, the foreign key raises an IntegrityError.
    """
    columns = dict(batch.columns)
    ids, emails = columns["author_id"], columns.pop("author_email")
    good = batch.good_rows()
    by_id = [id for row in good if (id := ids[row])]
    by_email = [email for row in good if (email := emails[row])]
    known: dict[int | str | None, int | None] = {}
    known.update(zip(by_id, await matched(session, User.id, by_id, BigInt), strict=True))
    known.update(zip(by_email, await matched(session, User.email, by_email, Text()), strict=True))
    authors = [known.get(id or email) for id, email in zip(ids, emails, strict=True)]
    for row in good:
        if authors[row] is None:
            batch.fail(row, author_not_found("author_id" if ids[row] else "author_email"))
    return replace(batch, columns=columns | {"author_id": authors})


def author_not_found(field: str) -> AuthorNotFound:
    """Return the error for a post whose author does not exist."""
    return AuthorNotFound("there is no user for this author", field=field)


POSTS = BulkTable(Post, PostRepository.missing, prepare=resolve_authors)
