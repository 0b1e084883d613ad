"""PostRepository: all SQL about posts."""

from typing import ClassVar

from sqlalchemy.exc import IntegrityError

from roster.errors import AuthorNotFound, PostNotFound
from service.db.base import Session, Values
from service.db.bulk.table import BulkTable, Reference
from service.db.repository import Repository, SessionT
from service.db.selection import Row, Selection, columns_by_name, readable_columns, size_of
from service.posts.model import Post
from service.users.model import User
from service.users.rules import stored_spellings

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

    async def create(self: "PostRepository[Session]", values: Values) -> Row:
        """Insert a post; raises AuthorNotFound."""
        try:
            return await super().create(values)
        except IntegrityError:
            raise author_not_found("author_id") from None


def author_not_found(field: str) -> AuthorNotFound:
    """Return the error for a post whose author does not exist."""
    return AuthorNotFound("there is no user for this author", field=field)


AUTHORS = Reference(
    Post.author_id,
    {"author_id": User.id, "author_email": User.email},
    author_not_found,
    other_spellings={"author_email": stored_spellings},
)
# In the order of their authors, which PostgreSQL looks up and locks one by one.
POSTS = BulkTable(Post, PostRepository.missing, references=[AUTHORS], sort_by=Post.author_id)
