"""PostRepository: all SQL about posts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sqlalchemy import Text
from sqlalchemy.exc import IntegrityError

from service.db.base import BigInt, Session
from service.db.bulk.batch import Batch
from service.db.bulk.table import BulkTable
from service.db.dialect import ids_of
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


async def resolve_authors(session: Session, batch: Batch) -> Batch:
    """Return new posts with the ids of their authors, who are given by id or e-mail; fail posts without one.

    The authors are not locked. If one is deleted meanwhile, the foreign key raises an IntegrityError.
    """
    columns = dict(batch.columns)
    ids, emails = columns["author_id"], columns.pop("author_email")
    good = batch.good_rows()
    by_id = [id for row in good if (id := ids[row])]
    by_email = [email for row in good if (email := emails[row])]
    known: dict[int | str | None, int | None] = {}
    known.update(zip(by_id, await ids_of(session, User.id, by_id, BigInt), strict=True))
    known.update(zip(by_email, await ids_of(session, User.email, by_email, Text()), strict=True))
    authors = [known.get(id or email) for id, email in zip(ids, emails, strict=True)]
    for row in good:
        if authors[row] is None:
            batch.fail(row, author_not_found("author_id" if ids[row] else "author_email"))
    return replace(batch, columns=columns | {"author_id": authors})


def author_not_found(field: str) -> AuthorNotFound:
    """Return the error for a post whose author does not exist."""
    return AuthorNotFound("there is no user for this author", field=field)


POSTS = BulkTable(Post, PostRepository.missing, prepare=resolve_authors)
