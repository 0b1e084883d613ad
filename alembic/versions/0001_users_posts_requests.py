"""Create users, posts and requests."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIGINT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def text(length: int | None = None) -> sa.String:
    kind = sa.String if length else sa.Text
    return kind(length).with_variant(kind(length, collation="C"), "postgresql")


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))" if sqlite else "now()")

    op.create_table(
        "users",
        sa.Column("id", BIGINT, sa.Identity(), nullable=False),
        sa.Column("email", text(255), nullable=False),
        sa.Column("hashed_password", text(512), nullable=True),
        sa.Column("full_name", text(255), nullable=True),
        sa.Column("is_active", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("created_at", TIME, server_default=now, nullable=False),
        sa.Column("updated_at", TIME, server_default=now, nullable=False),
        sa.Column("version", BIGINT, server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("email", name="uq_users_email"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_users_created_at_id", "users", ["created_at", "id"])

    op.create_table(
        "posts",
        sa.Column("id", BIGINT, sa.Identity(), nullable=False),
        sa.Column("title", text(255), nullable=False),
        sa.Column("content", text(), nullable=False),
        sa.Column("author_id", BIGINT, nullable=False),
        sa.Column("created_at", TIME, server_default=now, nullable=False),
        sa.Column("updated_at", TIME, server_default=now, nullable=False),
        sa.Column("version", BIGINT, server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_posts"),
        sa.ForeignKeyConstraint(
            ["author_id"], ["users.id"], name="fk_posts_author_id_users", ondelete="CASCADE"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_posts_author_id_id", "posts", ["author_id", "id"])
    op.create_index("ix_posts_created_at_id", "posts", ["created_at", "id"])

    op.create_table(
        "requests",
        sa.Column("caller", text(255), nullable=False),
        sa.Column("method", text(255), nullable=False),
        sa.Column("request_id", sa.Uuid(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", TIME, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("caller", "method", "request_id", name="pk_requests"),
    )
    op.create_index("ix_requests_created_at", "requests", ["created_at"])


def downgrade() -> None:
    op.drop_table("requests")
    op.drop_table("posts")
    op.drop_table("users")
