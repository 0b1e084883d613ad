"""Give loads the key (load_id, caller), so that two callers can have loads of one name.

The old key is `load_id`, which earlier releases name in `ON CONFLICT (load_id)`. The new one can't be added
next to it while they run: PostgreSQL reports a conflict with another key than the named one as an error, so
two streams that begin the same load at the same moment would fail.
https://www.postgresql.org/docs/current/sql-insert.html#SQL-ON-CONFLICT
"""

from contextlib import AbstractContextManager

import sqlalchemy as sa
from alembic import op
from alembic.operations import BatchOperations
from alembic.util import CommandError

from service.db.ddl import create_index, drop_index

revision = "0004"
down_revision = "0010"
min_revision = "0003"

LOADS_OF_ONE_NAME = "SELECT load_id FROM bulk_loads GROUP BY load_id HAVING count(*) > 1 LIMIT 1"

BIGINT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)
NOW = sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))")
NEW_KEY = "uq_bulk_loads_load_id_caller"
OLD_KEY = "uq_bulk_loads_load_id"


def upgrade() -> None:
    create_index(NEW_KEY, "bulk_loads", ["load_id", "caller"], unique=True)
    if op.get_context().dialect.name == "sqlite":
        with replaced_on_sqlite(sa.UniqueConstraint("load_id", name=OLD_KEY)) as loads:
            loads.drop_constraint(OLD_KEY, type_="unique")
    else:
        op.drop_constraint(OLD_KEY, "bulk_loads", type_="unique")


def downgrade() -> None:
    if not op.get_context().as_sql:
        refuse_loads_of_one_name()
    if op.get_context().dialect.name == "sqlite":
        with replaced_on_sqlite() as loads:
            loads.create_unique_constraint(OLD_KEY, ["load_id"])
        drop_index(NEW_KEY, "bulk_loads")
    else:
        # In the transaction of the version, so not CONCURRENTLY: an interrupted run leaves the schema as it
        # was, with the key of its version. A row is a load: even a million of them take only seconds.
        op.create_unique_constraint(OLD_KEY, "bulk_loads", ["load_id"])
        op.drop_index(NEW_KEY, "bulk_loads")


def refuse_loads_of_one_name() -> None:
    load_id = op.get_bind().execute(sa.text(LOADS_OF_ONE_NAME)).scalar()
    if load_id is not None:
        raise CommandError(
            f"several callers have a load named {load_id!r}, which older releases can't hold; "
            "delete all but one of its rows in bulk_loads, then run this again"
        )


def replaced_on_sqlite(*constraints: sa.Constraint) -> AbstractContextManager[BatchOperations]:
    """Copy the table, as SQLite can't alter its constraints.

    The columns are written out because `--sql` has no database to read them from.
    """
    table = sa.Table(
        "bulk_loads",
        sa.MetaData(),
        sa.Column("id", BIGINT, nullable=False),
        sa.Column("load_id", sa.String(255), nullable=False),
        sa.Column("caller", sa.String(255), nullable=False),
        sa.Column("method", sa.String(255), nullable=False),
        sa.Column("options", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("epoch", BIGINT, server_default="1", nullable=False),
        sa.Column("next_offset", BIGINT, server_default="0", nullable=False),
        sa.Column("created", BIGINT, server_default="0", nullable=False),
        sa.Column("updated", BIGINT, server_default="0", nullable=False),
        sa.Column("skipped", BIGINT, server_default="0", nullable=False),
        sa.Column("failed", BIGINT, server_default="0", nullable=False),
        sa.Column("deleted", BIGINT, server_default="0", nullable=False),
        sa.Column("deleted_posts", BIGINT, server_default="0", nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bulk_loads"),
        sa.Index(NEW_KEY, "load_id", "caller", unique=True),
        *constraints,
    )
    return op.batch_alter_table(
        "bulk_loads", copy_from=table, recreate="always", table_kwargs={"sqlite_autoincrement": True}
    )
