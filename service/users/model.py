"""The table of users."""

from typing import TYPE_CHECKING

from sqlalchemy import Index, UniqueConstraint, true
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.db.base import Entity, text

if TYPE_CHECKING:
    from service.posts.model import Post


class User(Entity):
    """A person; the e-mail is stored normalised and is unique."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("email"),
        Index(None, "created_at", "id"),
        {"sqlite_autoincrement": True},  # otherwise SQLite gives a deleted user's id to the next one
    )

    email: Mapped[str] = mapped_column(text(255))
    # Read by VerifyPassword alone.
    hashed_password: Mapped[str | None] = mapped_column(text(512), deferred=True, deferred_raiseload=True)
    full_name: Mapped[str | None] = mapped_column(text(255))
    is_active: Mapped[bool] = mapped_column(server_default=true())

    # A lazy load would be one more statement a row: what is wanted is asked for in the repository.
    posts: Mapped[list["Post"]] = relationship(
        back_populates="author", lazy="raise", passive_deletes=True, order_by="Post.id.desc()"
    )
