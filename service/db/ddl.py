"""Steps of migrations that do not stop the service. Migrations import this module and nothing else of it.

A released migration keeps calling these functions, so their names, parameters and effects don't change.

On PostgreSQL an index is built CONCURRENTLY, which does not block writes. That works only outside a
transaction: everything that the migration did before is committed. Therefore call these functions first in a
migration. All of them can be repeated: a migration that was interrupted after one of them starts again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

# Don't wait long for a table: calls would queue after the waiting statement.
LOCK_TIMEOUT = "1s"
IS_VALID = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")


def create_index(name: str, table: str, columns: Sequence[str], *, unique: bool = False) -> None:
    """Build an index without blocking writes.

    An index of this name that an interrupted run has left invalid is dropped and built again.
    """
    if op.get_context().dialect.name == "sqlite":
        op.create_index(name, table, columns, unique=unique)
        return
    with _outside_transaction():
        is_valid = None
        if not op.get_context().as_sql:
            is_valid = op.get_bind().execute(IS_VALID, {"name": name}).scalar()
        if is_valid is False:
            op.drop_index(name, table, postgresql_concurrently=True)
        if not is_valid:
            op.create_index(name, table, columns, unique=unique, postgresql_concurrently=True)


def drop_index(name: str, table: str) -> None:
    """Drop an index, if it exists, without blocking writes."""
    if op.get_context().dialect.name == "sqlite":
        op.drop_index(name, table)
        return
    with _outside_transaction():
        op.drop_index(name, table, postgresql_concurrently=True, if_exists=True)


def create_unique_constraint(name: str, table: str, columns: Sequence[str]) -> None:
    """Add a unique constraint on PostgreSQL, without blocking writes while its index is built."""
    create_index(name, table, columns, unique=True)
    op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} UNIQUE USING INDEX {name}")


@contextmanager
def _outside_transaction() -> Iterator[None]:
    """Leave the transaction of the migration, and begin another one afterwards."""
    with op.get_context().autocommit_block():
        # To build an index CONCURRENTLY waits for all older transactions, but nothing waits for it.
        op.execute("SET lock_timeout = 0")
        try:
            yield
        finally:
            op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
