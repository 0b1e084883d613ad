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
        {"sqlite_autoincrement": True},  # otherwise SQLite would reuse the ids of deleted users
    )

    email: Mapped[str] = mapped_column(text(255))
    # Deferred: only VerifyPassword reads it.
    hashed_password: Mapped[str | None] = mapped_column(text(512), deferred=True, deferred_raiseload=True)
    full_name: Mapped[str | None] = mapped_column(text(255))
    is_active: Mapped[bool] = mapped_column(server_default=true())

    # A lazy load would be one more statement for each row: repositories join what a view shows.
    posts: Mapped[list["Post"]] = relationship(
        back_populates="author", lazy="raise", passive_deletes=True, order_by="Post.id.desc()"
    )
