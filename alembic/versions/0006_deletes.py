"""Count deleted rows, note of which row each stored answer is, and keep the keys of page tokens.

It comes before 0004, which is contracting: a release's expanding migrations come first. Its steps can be
repeated: each of them is committed by itself, and 0007 runs them again.
"""

import sqlalchemy as sa
from alembic import op

from service.db.ddl import add_columns, create_index, drop_index

revision = "0006"
down_revision = "0003"

BIGINT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT = sa.String(63).with_variant(sa.String(63, collation="C"), "postgresql")
ANSWERS = "ix_requests_entity_id_entity"
KEYS = "page_token_keys"


def columns() -> list[tuple[str, sa.Column[object]]]:
    return [
        ("requests", sa.Column("entity", TEXT, nullable=True)),
        ("requests", sa.Column("entity_id", BIGINT, nullable=True)),
        ("bulk_loads", sa.Column("deleted", BIGINT, server_default="0", nullable=False)),
        ("bulk_loads", sa.Column("deleted_posts", BIGINT, server_default="0", nullable=False)),
        ("bulk_batches", sa.Column("deleted_posts", sa.LargeBinary(), nullable=True)),
    ]


def upgrade() -> None:
    add_columns(columns())
    create_index(ANSWERS, "requests", ["entity_id", "entity"])
    op.create_table(
        KEYS,
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("day", name="pk_page_token_keys"),
        if_not_exists=True,
    )


def downgrade() -> None:
    is_postgresql = op.get_context().dialect.name != "sqlite"
    if is_postgresql:
        # A contracting 0004 that was refused or interrupted may have left its index.
        drop_index("uq_bulk_loads_load_id_caller", "bulk_loads")
    drop_index(ANSWERS, "requests")
    op.drop_table(KEYS, if_exists=is_postgresql)
    for table, column in columns():
        op.drop_column(table, column.name, if_exists=is_postgresql)
