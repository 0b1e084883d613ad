"""Run the migrations of the schema, for `roster migrate` and for the embedded SQLite.

These functions block and run an event loop of their own: call them before the server's loop starts, or in a
thread. Those that migrate raise MigrationError.

They import Alembic when they run, because a server that has nothing to migrate needs none of it.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db.connect import postgresql_engine
from service.db.pooler import Mode, pooler_mode
from service.db.revisions import config_file
from service.db.schema import Schema, read_schema
from service.db.servers import older_servers
from service.db.sqlite_files import create_database

if TYPE_CHECKING:
    from alembic.config import Config

CONNECT_TIMEOUT_SECONDS = 30  # if the URL has no connect_timeout


class MigrationError(Exception):
    """The schema can't be migrated; nothing is wrong with the connection."""


def config(url: str = "") -> "Config":
    """Return Alembic's configuration for a database; without a URL, for the one in the settings."""
    from alembic.config import Config  # noqa: PLC0415

    configuration = Config(config_file())
    configuration.attributes["url"] = url
    return configuration


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema up to a revision; of two runs the second waits for the first.

    On SQLite all migrations are applied or none. On PostgreSQL each is; to run this again continues.
    """
    with _alembic() as command:
        command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to a revision, "base" being an empty one; drops the data it held."""
    with _alembic() as command:
        command.downgrade(config(url), revision)


def sql(url: str, revision: str = "head") -> None:
    """Print the SQL of an upgrade and run none of it; "0001:head" starts from a revision."""
    with _alembic() as command:
        command.upgrade(config(url), revision, sql=True)


@contextmanager
def _alembic() -> Iterator[Any]:
    """Import Alembic's commands, and raise their refusals as MigrationError."""
    from alembic import command  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        yield command
    except CommandError as error:
        raise MigrationError(str(error)) from error


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


def mode_of_pooler(url: str) -> Mode:
    """Return the mode of the pooler between Roster and a database of PostgreSQL, or none."""
    return asyncio.run(pooler_mode(url, CONNECT_TIMEOUT_SECONDS))


def migration_engine(url: str) -> AsyncEngine:
    """Return an engine for migrations.

    Not that of the service: on SQLite it enforces foreign keys, and replacing a table would delete the rows
    that refer to it.
    """
    if url.startswith("sqlite"):
        create_database(url)
        return create_async_engine(url, poolclass=NullPool)
    return postgresql_engine(url, poolclass=NullPool, timeout=CONNECT_TIMEOUT_SECONDS)
