"""Log the changes of users and posts, for the change feed.

Triggers write the log, so that it has the changes of all writers: also of servers of an older release, and
of people. It comes before 0004, which is contracting: a release's expanding migrations come first. Its steps
can be repeated: each of them is committed by itself, and 0009 runs them again.
"""

import sqlalchemy as sa
from alembic import op

from service.db.ddl import has_transaction_ids, log_changes, stop_logging_changes

revision = "0008"
down_revision = "0006"

TABLES = ("users", "posts")
BIGINT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IDS = sa.LargeBinary().with_variant(sa.BigInteger(), "sqlite")
TEXT = sa.String(63).with_variant(sa.String(63, collation="C"), "postgresql")
# The first read of the feed adds the cluster and the rest.
FIRST_FEED = """
    INSERT INTO feed (feed_id)
    SELECT replace(gen_random_uuid()::text, '-', '') WHERE NOT EXISTS (SELECT 1 FROM feed)
"""
FIRST_FEED_OF_SQLITE = """
    INSERT INTO feed (feed_id) SELECT lower(hex(randomblob(16))) WHERE NOT EXISTS (SELECT 1 FROM feed)
"""


class Xid8(sa.types.UserDefinedType[int]):
    """The id of a transaction, which is never used again."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "xid8"


def upgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    # On an engine without ids of transactions, these tables stay empty.
    has_xids = has_transaction_ids()
    xid = Xid8() if has_xids else sa.BigInteger()
    clock = "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))" if is_sqlite else "now()"
    op.create_table(
        "changes",
        sa.Column("id", BIGINT, sa.Identity(), nullable=False),
        sa.Column(
            "xid", xid, server_default=sa.text("pg_current_xact_id()" if has_xids else "0"), nullable=False
        ),
        sa.Column("entity", TEXT, nullable=False),
        sa.Column("ids", IDS, nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), server_default=sa.text(clock), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_changes"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    if has_xids:
        # To compress the ids of a batch would take PostgreSQL a tenth more CPU for each row of a load.
        op.execute("ALTER TABLE changes ALTER COLUMN ids SET STORAGE EXTERNAL")
    if not is_sqlite:
        op.create_index("ix_changes_xid_id", "changes", ["xid", "id"], if_not_exists=True)
    op.create_table(
        "feed",
        sa.Column("feed_id", sa.String(32), nullable=False),
        sa.Column("system_identifier", sa.BigInteger(), nullable=True),
        sa.Column("timeline", sa.BigInteger(), nullable=True),
        sa.Column("database_oid", sa.BigInteger(), nullable=True),
        sa.Column("table_oid", sa.BigInteger(), nullable=True),
        sa.Column("pruned_xid", xid, server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("feed_id", name="pk_feed"),
        if_not_exists=True,
    )
    op.execute(FIRST_FEED_OF_SQLITE if is_sqlite else FIRST_FEED)
    log_changes(*TABLES)


def downgrade() -> None:
    stop_logging_changes(*TABLES)
    op.drop_table("changes", if_exists=True)
    op.drop_table("feed", if_exists=True)
    if op.get_context().dialect.name != "sqlite":
        op.execute("DROP FUNCTION IF EXISTS log_changes(), log_old_id(), reset_feed(), begin_feed()")
