"""Migrations as this release runs them, and as those before revision 0003 did, with `alembic_version`."""

import asyncio
from collections.abc import Sequence

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from service.db import migrations


async def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema up to a revision."""
    await asyncio.to_thread(migrations.upgrade, url, revision)


async def downgrade(url: str, revision: str) -> None:
    """Take the schema back to a revision."""
    await asyncio.to_thread(migrations.downgrade, url, revision)


async def execute(engine: AsyncEngine, *statements: str, **parameters: str) -> None:
    """Run statements in one transaction."""
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement), parameters)


async def migrate_as_old_release(engine: AsyncEngine, revision: str = "0002") -> None:
    """Bring an empty database up to a revision, as that release did."""
    async with engine.begin() as connection:
        await connection.run_sync(_migrate, revision)


def _migrate(connection: Connection, revision: str) -> None:
    scripts = ScriptDirectory.from_config(migrations.config())
    context = MigrationContext.configure(
        connection, opts={"fn": lambda current, _: scripts._upgrade_revs(revision, current)}
    )
    with Operations.context(context):
        context.run_migrations()


async def old_version(engine: AsyncEngine) -> Sequence[str] | None:
    """Return the rows of `alembic_version`, None if there is no such table."""
    async with engine.connect() as connection:
        if not await connection.run_sync(lambda sync: sync.dialect.has_table(sync, "alembic_version")):
            return None
        return (await connection.scalars(text("SELECT version_num FROM alembic_version"))).all()
