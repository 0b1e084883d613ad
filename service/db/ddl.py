"""Steps of migrations that do not stop the service. Migrations import this module and nothing else of Roster.

A released migration keeps calling these functions, so their names, parameters and effects don't change.

On PostgreSQL an index is built CONCURRENTLY, which does not block writes. That works only outside a
transaction: everything that the migration did before is committed. Therefore call these functions first in a
migration. All of them can be repeated: a migration that was interrupted after one of them starts again.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

# Don't wait long for a table: calls would queue after the waiting statement.
LOCK_TIMEOUT = "1s"
PROGRESS_SECONDS = 5
IS_VALID = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")


def create_index(name: str, table: str, columns: Sequence[str], *, unique: bool = False) -> None:
    """Build an index without blocking writes.

    An index that can't be completed is dropped: even an invalid one of a unique key may refuse rows. One that
    a killed run has left invalid is dropped and built again.
    """
    if op.get_context().dialect.name == "sqlite":
        op.create_index(name, table, columns, unique=unique)
        return
    with _outside_transaction():
        is_valid = None
        if not op.get_context().as_sql:
            is_valid = op.get_bind().execute(IS_VALID, {"name": name}).scalar()
            _announce(name, table)
        if is_valid is False:
            op.drop_index(name, table, postgresql_concurrently=True)
        if is_valid:
            return
        try:
            op.create_index(name, table, columns, unique=unique, postgresql_concurrently=True)
        except DBAPIError:
            with suppress(DBAPIError):  # the first error is the one to report
                op.drop_index(name, table, postgresql_concurrently=True, if_exists=True)
            raise


def drop_index(name: str, table: str) -> None:
    """Drop an index, if it exists, without blocking writes."""
    if op.get_context().dialect.name == "sqlite":
        op.drop_index(name, table)
        return
    with _outside_transaction():
        op.drop_index(name, table, postgresql_concurrently=True, if_exists=True)


def backfill(table: str, statement: str, *, batch_rows: int = 10_000) -> None:
    """Run an UPDATE of many rows in batches; on PostgreSQL each batch has a transaction of its own.

    The statement updates the rows with an `id` from `:first` to `:last`, both inclusive, and skips rows that
    are already filled: after an interruption the backfill starts at the first row again, and only reads them.
    Servers must fill the column of new rows before it begins, or it needs a server default.
    """
    if op.get_context().as_sql:
        limits = {"first": -(1 << 63), "last": (1 << 63) - 1}
        op.execute(sa.text(statement).bindparams(**limits))
    elif op.get_context().dialect.name == "sqlite":
        _fill(table, statement, batch_rows)
    else:
        with op.get_context().autocommit_block():
            _fill(table, statement, batch_rows)


def _fill(table: str, statement: str, batch_rows: int) -> None:
    rows = sa.table(table, sa.column("id"))
    connection = op.get_bind()
    last_of_all, end, announced = connection.scalar(sa.select(sa.func.max(rows.c.id))), None, time.monotonic()
    while True:
        ids = sa.select(rows.c.id).order_by(rows.c.id).limit(batch_rows)
        if end is not None:
            ids = ids.where(rows.c.id > end)
        batch = ids.subquery()
        first, last = connection.execute(sa.select(sa.func.min(batch.c.id), sa.func.max(batch.c.id))).one()
        if first is None:
            return
        connection.execute(sa.text(statement), {"first": first, "last": last})
        end = last
        if time.monotonic() - announced > PROGRESS_SECONDS:
            announced = time.monotonic()
            log.info("filling %s: reached id %s of %s", table, end, last_of_all)


def _announce(index: str, table: str) -> None:
    rows = sa.table(table)
    if op.get_bind().scalar(sa.select(sa.exists(sa.select(sa.literal(1)).select_from(rows)))):
        log.info("building index %s on %s; this waits for transactions that are already open", index, table)


@contextmanager
def _outside_transaction() -> Iterator[None]:
    """Leave the transaction of the migration, and begin another one afterwards."""
    with op.get_context().autocommit_block():
        # An index that is built CONCURRENTLY waits for all older transactions, but nothing waits for it.
        op.execute("SET lock_timeout = 0")
        try:
            yield
        finally:
            op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
