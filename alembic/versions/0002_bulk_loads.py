"""Create bulk loads and the outcomes of their batches."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIGINT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))" if sqlite else "now()")

    op.create_table(
        "bulk_loads",
        sa.Column("id", BIGINT, sa.Identity(), nullable=False),
        sa.Column("load_id", text(255), nullable=False),
        sa.Column("caller", text(255), nullable=False),
        sa.Column("method", text(255), nullable=False),
        sa.Column("options", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("epoch", BIGINT, server_default="1", nullable=False),
        sa.Column("next_offset", BIGINT, server_default="0", nullable=False),
        sa.Column("created", BIGINT, server_default="0", nullable=False),
        sa.Column("updated", BIGINT, server_default="0", nullable=False),
        sa.Column("skipped", BIGINT, server_default="0", nullable=False),
        sa.Column("failed", BIGINT, server_default="0", nullable=False),
        sa.Column("created_at", TIME, server_default=now, nullable=False),
        sa.Column("updated_at", TIME, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bulk_loads"),
        sa.UniqueConstraint("load_id", name="uq_bulk_loads_load_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "bulk_batches",
        sa.Column("load", BIGINT, nullable=False),
        sa.Column("first_offset", BIGINT, nullable=False),
        sa.Column("next_offset", BIGINT, nullable=False),
        sa.Column("results", sa.LargeBinary(), nullable=False),
        sa.Column("ids", sa.LargeBinary(), nullable=False),
        sa.Column("failures", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("load", "first_offset", name="pk_bulk_batches"),
        sa.ForeignKeyConstraint(
            ["load"], ["bulk_loads.id"], name="fk_bulk_batches_load_bulk_loads", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    op.drop_table("bulk_batches")
    op.drop_table("bulk_loads")
