"""Steps of migrations that do not stop the service. Migrations import this module and nothing else of Roster.

A released migration keeps calling these functions, so their names, parameters and effects don't change.

On PostgreSQL an index is built CONCURRENTLY, which does not block writes. That works only outside a
transaction: everything that the migration did before is committed. Therefore call these functions first in a
migration. All of them can be repeated: a migration that was interrupted after one of them starts again.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

# Don't wait long for a table: calls would queue after the waiting statement.
LOCK_TIMEOUT = "1s"
# Citus changes the shards of a node over one connection, so that a transaction can change two of its tables
# that refer to each other; or over several at once, for long work outside a transaction.
SET_MODE = """
    SELECT set_config('citus.multi_shard_modify_mode', '{mode}', false)
    WHERE EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')
"""
ONE_BY_ONE, AT_ONCE = SET_MODE.format(mode="sequential"), SET_MODE.format(mode="parallel")
PROGRESS_SECONDS = 5
IS_VALID = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")


def add_columns(columns: Iterable[tuple[str, sa.Column[Any]]]) -> None:
    """Add columns to their tables, unless they exist.

    On PostgreSQL each has a transaction of its own, which locks one table only. So a migration of several
    tables can't deadlock with calls that use them in another order.
    """
    missing = [(table, column) for table, column in columns if not _has_column(table, column.name)]
    if not missing:
        return
    is_sqlite = op.get_context().dialect.name == "sqlite"
    with nullcontext() if is_sqlite else op.get_context().autocommit_block():
        for table, column in missing:
            op.add_column(table, column)


def create_index(name: str, table: str, columns: Sequence[str], *, unique: bool = False) -> None:
    """Build an index without blocking writes.

    An index that can't be completed is dropped: even an invalid one of a unique key may refuse rows. One that
    a killed run has left invalid is dropped and built again.
    """
    if op.get_context().dialect.name == "sqlite":
        op.create_index(name, table, columns, unique=unique, if_not_exists=True)
        return
    with _outside_transaction():
        if not op.get_context().as_sql:
            is_valid = op.get_bind().execute(IS_VALID, {"name": name}).scalar()
            if is_valid:
                return
            _announce(name, table)
            if is_valid is False:
                op.drop_index(name, table, postgresql_concurrently=True)
        try:
            op.create_index(name, table, columns, unique=unique, postgresql_concurrently=True)
        except DBAPIError:
            with suppress(DBAPIError):  # the first error is the one to report
                op.drop_index(name, table, postgresql_concurrently=True, if_exists=True)
            raise


def drop_index(name: str, table: str) -> None:
    """Drop an index, if it exists, without blocking writes."""
    if op.get_context().dialect.name == "sqlite":
        op.drop_index(name, table, if_exists=True)
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
        with op.get_context().autocommit_block(), _all_shards_at_once():
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


def _has_column(table: str, name: str) -> bool:
    if op.get_context().as_sql:  # the SQL is for an empty database
        return False
    return name in {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}


def _announce(index: str, table: str) -> None:
    rows = sa.table(table)
    if op.get_bind().scalar(sa.select(sa.exists(sa.select(sa.literal(1)).select_from(rows)))):
        log.info("building index %s on %s; this waits for transactions that are already open", index, table)


@contextmanager
def _all_shards_at_once() -> Iterator[None]:
    if op.get_context().as_sql:
        yield
        return
    op.execute(AT_ONCE)
    try:
        yield
    finally:
        op.execute(ONE_BY_ONE)


@contextmanager
def _outside_transaction() -> Iterator[None]:
    """Leave the transaction of the migration, and begin another one afterwards."""
    with op.get_context().autocommit_block(), _all_shards_at_once():
        # An index that is built CONCURRENTLY waits for all older transactions, but nothing waits for it.
        op.execute("SET lock_timeout = 0")
        try:
            yield
        finally:
            op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")


HAS_TRANSACTION_IDS = """
    SELECT EXISTS (SELECT FROM pg_type WHERE typname = 'xid8')
       AND EXISTS (SELECT FROM pg_proc WHERE proname = 'pg_current_xact_id')
"""
# Citus can't distribute a table that has triggers, and it commits on the coordinator before its workers.
IS_CITUS = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"
# How engines that speak PostgreSQL's protocol refuse a trigger: not supported, not known, a syntax error.
CANT_LOG = ("0A", "42601", "42704", "42883")
# Functions run with the rights of their owner: a role that may write a table needs no right to the log. The
# log is in the schema of the table, which may have another name after a restore. It is searched first: a
# session can make a temporary table named `changes`. Only the owner may make triggers with these functions:
# in another schema, they would run the code of others with the owner's rights.
CREATE_FUNCTION = """
    DO $do$ BEGIN
        CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql
        SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            PERFORM set_config('search_path', quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
            {body}
        END $$;
        REVOKE ALL ON FUNCTION {name}() FROM PUBLIC;
    END $do$
"""
FUNCTIONS = {
    # The ids of a statement's rows, at most 5000 in each entry. The service changes at most 5000 rows at
    # once. Numbering rows costs 0.4 µs a row, so it is only done for more.
    "log_changes": """
            INSERT INTO changes (entity, ids)
            SELECT TG_TABLE_NAME, string_agg(int8send(id), '')
            FROM (SELECT id FROM changed LIMIT 5001) AS first_rows
            HAVING count(*) BETWEEN 1 AND 5000;
            IF NOT FOUND THEN
                INSERT INTO changes (entity, ids)
                SELECT TG_TABLE_NAME, string_agg(int8send(id), '')
                FROM (SELECT id, (row_number() OVER () - 1) / 5000 AS part FROM changed) AS numbered
                GROUP BY part;
            END IF;
            RETURN NULL;
    """,
    # Somebody may change an id by hand. Its old row is gone; the new one is logged like any other.
    "log_old_id": """
            INSERT INTO changes (entity, ids) VALUES (TG_TABLE_NAME, int8send(OLD.id));
            RETURN NULL;
    """,
    # Nobody can say which rows a TRUNCATE has deleted, or which entries if it is the log that was emptied.
    "reset_feed": """
            UPDATE feed SET feed_id = replace(gen_random_uuid()::text, '-', '');
            RETURN NULL;
    """,
    # A row that is inserted comes from a backup. The next read sees that it is not of this database.
    "begin_feed": """
            DELETE FROM feed;
            NEW.feed_id := replace(gen_random_uuid()::text, '-', '');
            NEW.system_identifier := NULL;
            RETURN NEW;
    """,
}
# CREATE TRIGGER locks its table before it finds that the trigger exists.
CREATE_TRIGGER = """
    DO $$ BEGIN
        IF NOT EXISTS (
            SELECT FROM pg_trigger WHERE tgrelid = to_regclass('{table}') AND tgname = '{name}'
        ) THEN
            CREATE TRIGGER {name} {event} ON {table} {execute};
        END IF;
    END $$
"""
# Citus refuses DROP TRIGGER for a table that it distributes, also IF EXISTS.
DROP_TRIGGER = """
    DO $$ BEGIN
        IF EXISTS (
            SELECT FROM pg_trigger WHERE tgrelid = to_regclass('{table}') AND tgname = '{name}'
        ) THEN
            DROP TRIGGER {name} ON {table};
        END IF;
    END $$
"""
CREATE_TRIGGER_OF_SQLITE = """
    CREATE TRIGGER IF NOT EXISTS log_{name}_of_{table} AFTER {event} ON {table} {when} BEGIN
        INSERT INTO changes (entity, ids) VALUES ('{table}', {row}.id);
    END
"""
CHANGED = {"INSERT": "NEW", "UPDATE": "NEW", "DELETE": "OLD"}
OLD_ID = {"name": "old_id", "event": "UPDATE OF id", "row": "OLD", "when": "WHEN (OLD.id <> NEW.id)"}
ON_OLD_ID = {
    "name": "log_old_id",
    "event": "AFTER UPDATE OF id",
    "execute": f"FOR EACH ROW {OLD_ID['when']} EXECUTE FUNCTION log_old_id()",
}
ON_TRUNCATE = {
    "name": "reset_feed",
    "event": "AFTER TRUNCATE",
    "execute": "FOR EACH STATEMENT EXECUTE FUNCTION reset_feed()",
}
ON_RESTORE = {
    "name": "begin_feed",
    "event": "BEFORE INSERT",
    "execute": "FOR EACH ROW EXECUTE FUNCTION begin_feed()",
}


def has_transaction_ids() -> bool:
    """Return whether this is PostgreSQL, or an engine whose transactions have ids as well."""
    context = op.get_context()
    is_postgresql = context.dialect.name != "sqlite"
    return is_postgresql and (context.as_sql or bool(op.get_bind().scalar(sa.text(HAS_TRANSACTION_IDS))))


def log_changes(*tables: str) -> None:
    """Create the triggers that log the changes of tables for the feed, unless they exist.

    The tables have an `id`. On SQLite each row has an entry of its own. On PostgreSQL each trigger is created
    in a transaction of its own, so that only one table is locked at a time, and not for long. An engine that
    has no such triggers works without: then the feed says that it is missing.
    """
    if op.get_context().dialect.name == "sqlite":
        for table in tables:
            for event, row in CHANGED.items():
                names = {"name": event.lower(), "event": event, "row": row, "when": ""}
                op.execute(CREATE_TRIGGER_OF_SQLITE.format(table=table, **names))
            op.execute(CREATE_TRIGGER_OF_SQLITE.format(table=table, **OLD_ID))
        return
    if not has_transaction_ids():
        log.warning("this database has no ids of transactions, so there will be no change feed")
        return
    if not op.get_context().as_sql and op.get_bind().scalar(sa.text(IS_CITUS)):
        log.warning("this database has the extension citus, so there will be no change feed")
        return
    try:
        with op.get_context().autocommit_block():
            _create_triggers(tables)
    except DBAPIError as error:
        code = str(getattr(error.orig, "sqlstate", None))
        if not code.startswith(CANT_LOG):
            raise
        log.warning("this database can't log changes, so there will be no change feed: %s", error.orig)
        stop_logging_changes(*tables)


def _create_triggers(tables: Iterable[str]) -> None:
    for name, body in FUNCTIONS.items():
        op.execute(CREATE_FUNCTION.format(name=name, body=body.strip()))
    for table in tables:
        for event, row in CHANGED.items():
            execute = f"REFERENCING {row} TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION log_changes()"
            trigger = {"name": f"log_{event.lower()}", "event": f"AFTER {event}", "execute": execute}
            op.execute(CREATE_TRIGGER.format(table=table, **trigger))
        op.execute(CREATE_TRIGGER.format(table=table, **ON_OLD_ID))
        op.execute(CREATE_TRIGGER.format(table=table, **ON_TRUNCATE))
    op.execute(CREATE_TRIGGER.format(table="changes", **ON_TRUNCATE))
    op.execute(CREATE_TRIGGER.format(table="feed", **ON_RESTORE))


def stop_logging_changes(*tables: str) -> None:
    """Drop the triggers of `log_changes` on these tables."""
    is_sqlite = op.get_context().dialect.name == "sqlite"
    names = [f"log_{event.lower()}" for event in CHANGED] + ["log_old_id"]
    if is_sqlite:
        for table in tables:
            for name in names:
                op.execute(f"DROP TRIGGER IF EXISTS {name}_of_{table}")
        return
    with op.get_context().autocommit_block():
        for table in tables:
            for name in (*names, "reset_feed"):
                op.execute(DROP_TRIGGER.format(table=table, name=name))
