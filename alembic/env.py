"""The environment of Alembic's commands; `service/db/migrations.py` passes the URL."""

import asyncio
import time
from typing import Any

from alembic import context
from alembic.ddl.sqlite import SQLiteImpl
from alembic.operations.batch import ApplyBatchImpl, BatchOperationsImpl
from sqlalchemy import Connection, DefaultClause, NullPool, Table
from sqlalchemy.ext.asyncio import create_async_engine

import service.db.servers
import service.idempotency
import service.loads.model
import service.posts.model
import service.users.model  # noqa: F401  (importing a module registers its tables)
from service.db.base import Base, UtcDateTime, now
from service.db.engine import connect
from service.files import create_database
from service.settings import Settings

# Shared with the previous release, which takes it in its transaction; the number is arbitrary.
LOCK = "SELECT pg_try_advisory_lock(7238001)"
LOCK_POLL_SECONDS = 0.1
# Don't wait long for a table: calls would queue after the waiting statement.
LOCK_TIMEOUT = "5s"


class SqliteImpl(SQLiteImpl):
    """Changes tables on SQLite without losing AUTOINCREMENT, so that no id is ever used again.

    SQLite can alter few things in place. For all others Alembic copies the table into a new one, and the copy
    would have neither AUTOINCREMENT nor the largest id that was ever used.
    """

    __dialect__ = "sqlite"  # registers the class in place of Alembic's own

    def requires_recreate_in_batch(self, batch_op: BatchOperationsImpl) -> bool:
        # Alembic would copy the table for a DROP COLUMN, which SQLite has since 3.35.
        in_place = {"drop_column", "drop_index", "create_index"}
        is_in_place = all(operation[0] in in_place for operation in batch_op.batch)
        return not is_in_place and super().requires_recreate_in_batch(batch_op)

    def prep_table_for_batch(self, batch_impl: ApplyBatchImpl, table: Table) -> None:
        """Prepare the copy of a table, which has no rows yet."""
        connection, copy = self.connection, batch_impl.new_table
        if copy is None:
            return
        if connection is not None and not self.as_sql:
            definition = "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?"
            sql = connection.exec_driver_sql(definition, (table.name,)).scalar_one()
            copy.dialect_options["sqlite"]["autoincrement"] = "AUTOINCREMENT" in sql
        if copy.dialect_options["sqlite"]["autoincrement"]:
            self.execute(
                f"INSERT INTO sqlite_sequence (name, seq) "  # noqa: S608  (both names are those of tables)
                f"SELECT '{copy.name}', seq FROM sqlite_sequence WHERE name = '{table.name}'"
            )


def number_revisions(migration: Any, revision: Any, directives: list[Any]) -> None:  # noqa: ARG001
    """Number the revisions 0001, 0002, and so on."""
    for script in directives:
        script.rev_id = f"{int(migration.script.get_current_head() or 0) + 1:04}"


def render_item(kind: str, item: Any, _: Any) -> str | bool:
    """Render what the service defines itself, since a migration must not import the service.

    `now()` is defined in `script.py.mako`: a draft made on one database has to run on the other.
    """
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "server_default" and isinstance(item, DefaultClause) and isinstance(item.arg, now):
        return "now()"
    return False


OPTIONS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "render_as_batch": True,
    "render_item": render_item,
    "process_revision_directives": number_revisions,
    # SQLite can roll back DDL too.
    "transactional_ddl": True,
}


def run(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        run_sqlite(connection)
    else:
        run_postgresql(connection)


def run_sqlite(connection: Connection) -> None:
    """Run all migrations in one transaction; SQLite can roll back DDL too."""
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        context.run_migrations()


def run_postgresql(connection: Connection) -> None:
    """Run each migration in a transaction of its own, holding the lock of the session."""
    wait_for_lock(connection)
    context.configure(connection=connection, transaction_per_migration=True, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


def wait_for_lock(connection: Connection) -> None:
    """Wait for a migration that is already running; the lock is held until the connection is closed.

    Neither holding the lock nor waiting for it may keep a transaction or a snapshot open: an index that the
    other migration builds CONCURRENTLY would wait for it for ever. Therefore this polls, in autocommit.
    """
    autocommit = connection.execution_options(isolation_level="AUTOCOMMIT")
    while not autocommit.exec_driver_sql(LOCK).scalar():
        time.sleep(LOCK_POLL_SECONDS)
    autocommit.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    autocommit.commit()
    connection.execution_options(isolation_level="READ COMMITTED")


async def run_online(url: str) -> None:
    # Not the engine of the service: on SQLite it enforces foreign keys, and replacing a table would delete
    # the rows that refer to it.
    options = {"async_creator_fn": connect}
    if url.startswith("sqlite"):
        options = {}
        create_database(url)
    engine = create_async_engine(url, poolclass=NullPool, connect_args=options)
    async with engine.connect() as connection:
        await connection.run_sync(run)


def run_offline(url: str) -> None:
    context.configure(url=url, literal_binds=True, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


url = context.config.attributes.get("url") or Settings().database_url
if context.is_offline_mode():
    run_offline(url)
else:
    asyncio.run(run_online(url))
