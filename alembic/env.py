"""The environment of Alembic's commands; `service/db/migrations.py` passes the URL."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from alembic import context
from alembic.ddl.sqlite import SQLiteImpl
from alembic.operations.batch import ApplyBatchImpl, BatchOperationsImpl
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.util import CommandError
from sqlalchemy import Connection, DefaultClause, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.elements import quoted_name

import service.changes.model
import service.db.answers
import service.db.token_keys
import service.loads.model
import service.posts.model
import service.users.model  # noqa: F401  (importing a module registers its tables; `migrations` does so for servers)
from service.changes.triggers import create_missing_triggers
from service.db import revisions, schema
from service.db.base import Base, UtcDateTime, now
from service.db.ddl import LOCK_TIMEOUT, ONE_BY_ONE
from service.db.errors import code_of
from service.db.migrations import migration_engine
from service.db.servers import older_servers
from service.settings import Settings

log = logging.getLogger(__name__)

# Shared with older releases, which take it in their transaction; the number is arbitrary.
LOCK = "SELECT pg_try_advisory_lock(7238001)"
UNLOCK = "SELECT pg_advisory_unlock(7238001)"
LOCK_POLL_SECONDS = 0.1
LOCK_ERRORS = {"55P03", "40P01"}  # lock_timeout, and a deadlock with somebody else's locks
PAUSES_SECONDS = (1, 2, 4, 8, 15, 15, 15)
# Sessions that have held a lock on a table of Roster for longer than the migration has waited. Only members
# of their role, or of pg_read_all_stats, see since when.
HOLDERS = """
    SELECT DISTINCT pid, usename, application_name
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'relation' AND granted AND pid <> pg_backend_pid()
      AND relation IN (SELECT oid FROM pg_class WHERE relname = ANY (CAST(:tables AS text[])))
      AND coalesce(xact_start < clock_timestamp() - CAST(CAST(:waited AS text) AS interval), true)
    ORDER BY pid
"""


class SqliteImpl(SQLiteImpl):
    """Changes tables on SQLite without losing AUTOINCREMENT, so that no id is ever used again, and triggers.

    SQLite can alter few things in place. For all others Alembic copies the table into a new one, and the copy
    would have neither AUTOINCREMENT nor the largest id that was ever used, and none of the triggers that log
    its changes.
    """

    __dialect__ = "sqlite"  # registers the class in place of Alembic's own
    _triggers: Sequence[str] = ()  # SQL of those that were dropped

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
            self._drop_triggers(connection)
        if copy.dialect_options["sqlite"]["autoincrement"]:
            self.execute(
                f"INSERT INTO sqlite_sequence (name, seq) "  # noqa: S608  (both names are those of tables)
                f"SELECT '{copy.name}', seq FROM sqlite_sequence WHERE name = '{table.name}'"
            )

    def _drop_triggers(self, connection: Connection) -> None:
        """Drop all triggers until the table is replaced: one that writes to it would prevent its renaming."""
        triggers = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
        ).all()
        self._triggers = [sql for _, sql in triggers]
        for name, _ in triggers:
            connection.exec_driver_sql(f'DROP TRIGGER "{name}"')

    def rename_table(
        self, old_table_name: str, new_table_name: str | quoted_name, schema: str | quoted_name | None = None
    ) -> None:
        """Rename a table, and create the triggers again that were dropped to replace it by a copy."""
        super().rename_table(old_table_name, new_table_name, schema)
        triggers, self._triggers = self._triggers, ()
        for sql in triggers:
            self.execute(sql)


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


def include_name(name: str | None, kind: str, _: object) -> bool:
    """Leave out tables that no model describes: those of the version, also that of other applications."""
    return kind != "table" or name not in {schema.COMPATIBILITY.name, schema.OLD_VERSION_TABLE}


def include_object(item: Any, _: str | None, kind: str, is_reflected: bool, __: object) -> bool:
    """Leave out the indexes that a model has only on the other kind of database."""
    condition = getattr(item, "_ddl_if", None)  # SQLAlchemy has no public name for it
    is_of_model = kind == "index" and not is_reflected
    return not (is_of_model and condition) or condition.dialect == context.get_context().dialect.name


def record_step(ctx: MigrationContext, step: MigrationInfo, heads: set[str], **_: object) -> None:
    """Record, in the transaction of a migration, which releases its result admits."""
    number = next(iter(heads), None)
    if ctx.connection is not None and not ctx.as_sql:
        if step.is_upgrade:
            refuse_older_servers(ctx.connection, number)
        schema.record(ctx.connection, number)
        return
    # The SQL is for a database that an older release has never migrated.
    if step.is_upgrade and not step.down_revision_ids:
        for statement in schema.CREATE_COMPATIBILITY:
            ctx.execute(statement)
    ctx.execute(schema.compatibility_of(number))


def refuse_older_servers(connection: Connection, number: str | None) -> None:
    """Roll a contracting migration back if an older server has been started since `roster migrate` looked."""
    contracting = [revision.number for revision in revisions.revisions() if revision.is_contracting]
    if connection.dialect.name == "sqlite" or number not in contracting:
        return
    if servers := older_servers(connection):
        raise CommandError(
            f"servers are running that can't use revision {number}; stop or upgrade them, then run this "
            f"again: {'; '.join(servers)}"
        )


OPTIONS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "render_as_batch": True,
    "render_item": render_item,
    "process_revision_directives": number_revisions,
    "transactional_ddl": True,
    "version_table": schema.VERSION_TABLE,
    "on_version_apply": record_step,
    "include_name": include_name,
    "include_object": include_object,
}


def run(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        run_on_sqlite(connection)
    else:
        run_on_postgresql(connection)


def run_on_sqlite(connection: Connection) -> None:
    """Run all migrations in one transaction; SQLite can roll back DDL too."""
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        run_migrations(connection)


def run_on_postgresql(connection: Connection) -> None:
    """Run each migration in a transaction of its own, holding the lock of the session.

    A migration that waits for a lock for too long is rolled back and tried again after a pause, in which the
    calls that have queued after it go on. So does a `roster migrate` of an older release, which waits for the
    lock in a transaction: an index that is built CONCURRENTLY would wait for that, a deadlock.
    """
    for pause in (*PAUSES_SECONDS, None):
        wait_for_other_migrations(connection)
        context.configure(connection=connection, transaction_per_migration=True, **OPTIONS)
        try:
            with context.begin_transaction():
                run_migrations(connection)
        except DBAPIError as error:
            if code_of(error) not in LOCK_ERRORS:
                raise
            connection.rollback()
            if pause is None:
                advice = "end these sessions or wait for them, then run this again"
                raise CommandError(f"{blocked(connection)}; {advice}") from error
            log.warning("%s; trying again in %s s", blocked(connection), pause)
            connection.exec_driver_sql(UNLOCK)
            connection.commit()
            time.sleep(pause)
        else:
            return


def run_migrations(connection: Connection) -> None:
    """Run the migrations between the steps that keep the version."""
    if context.get_context().opts.get("dont_mutate"):  # `alembic current`
        context.run_migrations()
        return
    schema.prepare(connection, set(Base.metadata.tables))
    commit_step(connection)
    context.run_migrations()
    schema.hand_back(connection)
    commit_step(connection)
    # At a revision in the middle of an upgrade, the migrations that come create them.
    if connection.dialect.name != "sqlite" and schema.schema_of(connection).is_usable:
        create_missing_triggers(connection)
        connection.commit()


def commit_step(connection: Connection) -> None:
    """Commit, unless all migrations are one transaction."""
    if connection.dialect.name != "sqlite":
        connection.commit()


def wait_for_other_migrations(connection: Connection) -> None:
    """Take the lock against other migrations, which is held until the connection is closed.

    Neither holding the lock nor waiting for it may keep a transaction or a snapshot open: an index that the
    other migration builds CONCURRENTLY would wait for it for ever. Therefore this polls, in autocommit.
    """
    autocommit = connection.execution_options(isolation_level="AUTOCOMMIT")
    if not autocommit.exec_driver_sql(LOCK).scalar():
        log.warning("another migration is running; waiting for it to end")
        while not autocommit.exec_driver_sql(LOCK).scalar():
            time.sleep(LOCK_POLL_SECONDS)
    autocommit.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    autocommit.exec_driver_sql("SET statement_timeout = 0")  # a role's own would end a long build of an index
    autocommit.exec_driver_sql(ONE_BY_ONE)
    autocommit.commit()
    connection.execution_options(isolation_level="READ COMMITTED")


def blocked(connection: Connection) -> str:
    """Return a sentence about the sessions that have kept a migration from its lock."""
    tables = [*Base.metadata.tables]
    rows = connection.execute(text(HOLDERS), {"tables": tables, "waited": LOCK_TIMEOUT}).all()
    connection.rollback()
    holders = [f"pid {row.pid} (role {row.usename}, application {row.application_name!r})" for row in rows]
    named = f": {', '.join(holders)}" if holders else ""
    return f"the migration waits for a table that other sessions have locked{named}"


async def run_online(url: str) -> None:
    async with migration_engine(url).connect() as connection:
        await connection.run_sync(run)


def run_offline(url: str) -> None:
    # SQLAlchemy can't parse every URL of PostgreSQL; only the kind of the database matters here.
    kind = url if url.startswith("sqlite") else "postgresql+asyncpg://"
    context.configure(url=kind, literal_binds=True, transaction_per_migration=True, **OPTIONS)
    if not url.startswith("sqlite"):
        context.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    with context.begin_transaction():
        context.run_migrations()


url = context.config.attributes.get("url") or Settings().direct_url
if context.is_offline_mode():
    run_offline(url)
else:
    asyncio.run(run_online(url))
