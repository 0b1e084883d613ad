"""List the running servers."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))" if sqlite else "now()")

    op.create_table(
        "roster_servers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", text(255), nullable=False),
        sa.Column("release", text(50), nullable=False),
        sa.Column("revision", text(32), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_roster_servers"),
    )


def downgrade() -> None:
    op.drop_table("roster_servers")
