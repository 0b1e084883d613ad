"""The migrations make the schema that the models describe, on both databases, there and back."""

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import migrations, revisions
from service.db.base import Base
from service.db.schema import read_schema
from tests.support.migrations import downgrade, execute, upgrade
from tests.support.postgres import find_programs

CHECKOUT = Path(__file__).parents[2]
UPGRADE = "import sys; from service.db import migrations; migrations.upgrade(sys.argv[1])"
COLUMNS_OF_0006 = [
    "bulk_batches.deleted_posts",
    "bulk_loads.deleted",
    "bulk_loads.deleted_posts",
    "requests.entity",
    "requests.entity_id",
]
TABLES_OF_0008 = ["changes", "feed"]
COLUMN_OF_0010 = "requests.outcome"
VERSION_TABLES = "'alembic_version', 'roster_schema', 'schema_compatibility'"
# Whatever one can say of a table. Alembic's comparison leaves out collations and identities.
SCHEMA = {
    "sqlite": f"""
        SELECT CASE type WHEN 'trigger' THEN 'trigger ' || name ELSE name END AS name, sql FROM sqlite_schema
        WHERE sql IS NOT NULL AND tbl_name NOT IN ('sqlite_sequence', {VERSION_TABLES})
        ORDER BY name
    """,
    "postgresql": f"""
        SELECT format('%s.%s', table_name, column_name) AS name,
               concat_ws(' ', data_type, character_maximum_length, collation_name, is_nullable,
                         column_default, identity_generation) AS definition
        FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name NOT IN ({VERSION_TABLES})
        UNION ALL
        SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text NOT IN ({VERSION_TABLES})
        UNION ALL
        SELECT indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename NOT IN ({VERSION_TABLES})
        UNION ALL
        SELECT 'trigger ' || tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT 'trigger ' || proname, pg_get_functiondef(oid) FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
        ORDER BY name, definition
    """,
}


@pytest.fixture
async def engine(empty_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(empty_url, poolclass=NullPool)
    yield engine
    await engine.dispose()


async def schema(engine: AsyncEngine) -> list[tuple[str, str]]:
    async with engine.connect() as connection:
        rows = await connection.execute(text(SCHEMA[engine.dialect.name]))
        return [(name, normalise(definition)) for name, definition in rows]


def normalise(definition: str) -> str:
    """Return a definition with its columns in one order: a migration adds new columns at the end.

    SQLite quotes the name of a table that was renamed, as Alembic does with a copy.
    """
    head, parenthesis, body = " ".join(definition.replace('"', "").split()).partition(" ( ")
    parts = re.split(r"\s*,\s*(?![^(]*\))", body.removesuffix(")").strip())
    return head + parenthesis + ", ".join(sorted(parts))


async def test_models_and_migrations_agree(empty_url: str, engine: AsyncEngine) -> None:
    """The migrations make what the models alone would make, besides triggers, and `alembic check` agrees."""
    await upgrade(empty_url)
    await asyncio.to_thread(command.check, migrations.config(empty_url))
    migrated = [each for each in await schema(engine) if not each[0].startswith("trigger ")]

    await downgrade(empty_url, "base")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)

    assert await schema(engine) == migrated


def test_reads_the_revisions_that_alembic_finds() -> None:
    """In their order, with the oldest one whose code can run on each: they are read without Alembic."""
    scripts = [*ScriptDirectory.from_config(migrations.config()).walk_revisions()][::-1]

    assert revisions.numbers() == [script.revision for script in scripts]
    for revision, script in zip(revisions.revisions(), scripts, strict=True):
        assert revision.is_contracting == hasattr(script.module, "min_revision")
        assert revision.min_revision == getattr(script.module, "min_revision", revision.min_revision)


async def test_every_migration_goes_down_and_up_again(empty_url: str, engine: AsyncEngine) -> None:
    """A step down undoes a step up and nothing else."""
    scripts = ScriptDirectory.from_config(migrations.config()).walk_revisions()
    for revision in reversed([script.revision for script in scripts]):
        before = await schema(engine)
        await upgrade(empty_url, revision)
        after = await schema(engine)
        await downgrade(empty_url, "-1")
        assert await schema(engine) == before
        await upgrade(empty_url, revision)
        assert await schema(engine) == after


async def test_completes_a_database_that_was_at_0005_without_0006(
    empty_url: str, engine: AsyncEngine
) -> None:
    """As development versions made it; the state of the schema says what to do. It lacks 0008 and 0010."""
    await upgrade(empty_url)
    complete = await schema(engine)
    await downgrade(empty_url, "0005")
    await drop_what_0008_makes(engine)
    columns = [*COLUMNS_OF_0006, COLUMN_OF_0010]
    names = [column.split(".") for column in columns]
    drops = [f"ALTER TABLE {table} DROP COLUMN {name}" for table, name in names]
    await execute(engine, "DROP INDEX ix_requests_entity_id_entity", *drops)

    state = await read_schema(engine)
    assert not state.is_usable
    missing = [f"the column {name}" for name in columns] + [f"the table {n}" for n in TABLES_OF_0008]
    assert str(state) == (
        f"the schema is at revision 0005, but lacks {', '.join(missing)}; run `roster migrate --contract`"
    )

    await upgrade(empty_url)
    assert (await read_schema(engine)).is_usable
    assert await schema(engine) == complete


async def drop_what_0008_makes(engine: AsyncEngine) -> None:
    """Drop tables, triggers and functions."""
    if engine.dialect.name == "sqlite":
        names = [
            name.removeprefix("trigger ") for name, _ in await schema(engine) if name.startswith("trigger ")
        ]
        await execute(engine, *(f"DROP TRIGGER {name}" for name in names))
    else:
        await execute(engine, "DROP FUNCTION log_changes(), reset_feed(), begin_feed() CASCADE")
    await execute(engine, *(f"DROP TABLE {name}" for name in TABLES_OF_0008))


async def test_completes_a_database_that_was_at_0009_without_0010(
    empty_url: str, engine: AsyncEngine
) -> None:
    """As development versions made it; the state of the schema says what to do."""
    await upgrade(empty_url)
    complete = await schema(engine)
    await downgrade(empty_url, "0009")
    await execute(engine, "ALTER TABLE requests DROP COLUMN outcome")
    state = await read_schema(engine)
    assert not state.is_usable
    assert f"lacks the column {COLUMN_OF_0010}; run `roster migrate --contract`" in str(state)

    await upgrade(empty_url)
    assert (await read_schema(engine)).is_usable
    assert await schema(engine) == complete


async def test_completes_a_database_that_was_at_0007_without_0008(
    empty_url: str, engine: AsyncEngine
) -> None:
    """Its changes are logged from then on. It can also be downgraded."""
    await upgrade(empty_url)
    complete = await schema(engine)
    await downgrade(empty_url, "0007")
    await drop_what_0008_makes(engine)
    assert not (await read_schema(engine)).is_usable

    await upgrade(empty_url)
    assert (await read_schema(engine)).is_usable
    assert await schema(engine) == complete
    await execute(engine, "INSERT INTO users (email) VALUES ('ada@example.org')")
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT entity FROM changes")) == "users"

    await downgrade(empty_url, "0007")
    await drop_what_0008_makes(engine)
    await downgrade(empty_url, "0006")
    await upgrade(empty_url)
    assert await schema(engine) == complete


async def test_replaced_table_on_sqlite_keeps_its_triggers(empty_sqlite_url: str) -> None:
    """A table that Alembic copies; also the log itself, to which the triggers of other tables write."""
    await upgrade(empty_sqlite_url)
    engine = create_async_engine(empty_sqlite_url, poolclass=NullPool)
    before = [each for each in await schema(engine) if each[0].startswith("trigger ")]
    assert len(before) == 8

    def replace_tables(connection: Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)) as operations:
            for name in ("users", "changes", "posts"):
                with operations.batch_alter_table(name, recreate="always"):
                    pass

    async with engine.begin() as connection:
        await connection.run_sync(replace_tables)

    assert [each for each in await schema(engine) if each[0].startswith("trigger ")] == before
    user = "INSERT INTO users (email) VALUES ('ada@example.org')"
    await execute(engine, user, "UPDATE users SET version = 2", "DELETE FROM users")
    async with engine.connect() as connection:
        assert (await connection.scalars(text("SELECT ids FROM changes"))).all() == [1, 1, 1]
    await engine.dispose()


async def test_printed_sql_makes_the_same_schema(
    empty_url: str, engine: AsyncEngine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What `sql` prints does in the database's own shell what an upgrade does."""
    await asyncio.to_thread(migrations.sql, empty_url)
    script = tmp_path / "upgrade.sql"
    script.write_text(capsys.readouterr().out)
    run_in_shell(script, empty_url)
    printed = await schema(engine)
    assert (await read_schema(engine)).revision == revisions.head()

    await downgrade(empty_url, "base")
    await upgrade(empty_url)

    assert await schema(engine) == printed


def run_in_shell(script: Path, url: str) -> None:
    database = make_url(url)
    if database.drivername.startswith("sqlite"):
        with closing(sqlite3.connect(str(database.database))) as connection:
            connection.executescript(script.read_text())
    else:
        plain = database.set(drivername="postgresql").render_as_string(hide_password=False)
        psql = find_programs("psql") / "psql"
        subprocess.run([psql, plain, "--quiet", "--set=ON_ERROR_STOP=1", "--file", script], check=True)


async def test_current_revision_tells_a_new_database_from_one_at_head(
    empty_url: str, engine: AsyncEngine
) -> None:
    """A database that was never migrated has no revision; an upgraded one has the code's."""
    assert (await read_schema(engine)).revision is None
    await upgrade(empty_url)
    assert (await read_schema(engine)).revision == revisions.head()


async def test_failed_upgrade_leaves_nothing_behind(empty_url: str, engine: AsyncEngine) -> None:
    """An upgrade that fails half-way takes back the tables that it made before."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE others (number INTEGER)"))
        await connection.execute(text("CREATE INDEX requests ON others (number)"))
    before = await schema(engine)

    with pytest.raises(DBAPIError, match="already"):
        await upgrade(empty_url)

    assert await schema(engine) == before
    assert (await read_schema(engine)).revision is None


async def test_two_upgrades_at_once_both_succeed(empty_postgresql_url: str) -> None:
    """The second waits for the first, and finds nothing left to do."""
    engine = create_async_engine(empty_postgresql_url, poolclass=NullPool)
    async with engine.connect() as in_the_way:
        # As a migration of an older release does.
        await in_the_way.execute(text("SELECT pg_advisory_xact_lock(7238001)"))
        upgrades = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", UPGRADE, empty_postgresql_url)
            for _ in range(2)
        ]
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_try_advisory_lock%'"
        )
        async with engine.connect() as observer:
            while await observer.scalar(waiting) != len(upgrades):
                await observer.rollback()

    assert [await process.wait() for process in upgrades] == [0, 0]
    assert (await read_schema(engine)).revision == revisions.head()


def test_alembic_command_finds_the_database_of_the_settings(sqlite_url: str) -> None:
    """Run in a checkout, `alembic` works on the database that the service would."""
    shown = subprocess.check_output(
        [sys.executable, "-m", "alembic", "current"],
        cwd=CHECKOUT,
        env={**os.environ, "ROSTER_DATABASE_URL": sqlite_url},
        text=True,
    )
    assert shown == f"{revisions.head()} (head)\n"
