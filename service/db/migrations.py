"""Run the migrations of the schema, for `roster migrate` and for the embedded SQLite.

These functions block and run an event loop of their own: call them before the server's loop starts, or in a
thread.
"""

import asyncio

from alembic import command
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db.connect import postgresql_engine
from service.db.revisions import config
from service.db.schema import Schema, read_schema
from service.db.servers import older_servers
from service.files import create_database

CONNECT_TIMEOUT_SECONDS = 30  # if the URL has no connect_timeout


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema up to a revision; of two runs the second waits for the first.

    On SQLite all migrations are applied or none. On PostgreSQL each is; to run this again continues.
    """
    command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to a revision, "base" being an empty one; drops the data it held."""
    command.downgrade(config(url), revision)


def sql(url: str, revision: str = "head") -> None:
    """Print the SQL of an upgrade and run none of it; "0001:head" starts from a revision."""
    command.upgrade(config(url), revision, sql=True)


def schema(url: str) -> Schema:
    """Return the state of the schema in a database."""

    async def read() -> Schema:
        return await read_schema(migration_engine(url))

    return asyncio.run(read())


def older_servers_of(url: str) -> list[str]:
    """Describe the running servers that can't use the newest schema of this release."""

    async def read() -> list[str]:
        async with migration_engine(url).connect() as connection:
            return await connection.run_sync(older_servers)

    return asyncio.run(read())


def migration_engine(url: str) -> AsyncEngine:
    """Return an engine for migrations.

    Not that of the service: on SQLite it enforces foreign keys, and replacing a table would delete the rows
    that refer to it.
    """
    if url.startswith("sqlite"):
        create_database(url)
        return create_async_engine(url, poolclass=NullPool)
    return postgresql_engine(url, poolclass=NullPool, timeout=CONNECT_TIMEOUT_SECONDS)
