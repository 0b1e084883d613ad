"""The databases of the benchmarks: a new one for each run, on PostgreSQL or SQLite."""

import asyncio
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url, text

from service.db import migrations
from service.db.engine import Database
from service.settings import Settings
from tests.support.postgres import PostgresServer, find_programs

PSQL: tuple[str | Path, ...] = (
    find_programs("psql") / "psql",
    "--no-psqlrc",
    "--quiet",
    "--set=ON_ERROR_STOP=1",
)
# The same for every run, without checkpoints or autovacuum, which would affect some runs and not others.
SETTINGS = {
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
}

COPY_USERS = r"\copy users (email, full_name, hashed_password, is_active) from '{file}'"
# Takes the fields of a line in COPY's text format.
INSERT_USER = r"""
INSERT INTO users (email, full_name, hashed_password, is_active) VALUES (?, nullif(?, '\N'), ?, ? = 't')
"""


class PostgreSQL:
    """A durable PostgreSQL server, configured for loads; `pid` is that of its postmaster."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.pid = 0
        self.version = ""

    async def set_up(self) -> None:
        """Restart the server with SETTINGS."""
        url = plain_url(self._server.url.render_as_string())
        await execute(url, *(f"ALTER SYSTEM SET {name} = '{value}'" for name, value in SETTINGS.items()))
        self._server.stop()
        self._server.start()
        [(folder, version)] = await execute(
            url, "SELECT current_setting('data_directory'), current_setting('server_version')"
        )
        self.pid = _postmaster(folder)
        self.version = version

    @asynccontextmanager
    async def template(self, users: Path | None) -> AsyncIterator[str]:
        """Yield the name of a migrated database that contains the users of a file."""
        async with self._server.database() as url:
            await asyncio.to_thread(migrations.upgrade, url)
            if users:
                copy = COPY_USERS.format(file=users)
                await asyncio.to_thread(
                    subprocess.run, [*PSQL, "--command", copy, plain_url(url)], check=True
                )
            await execute(plain_url(url), "VACUUM ANALYZE")
            yield str(make_url(url).database)

    @asynccontextmanager
    async def database(self, template: str) -> AsyncIterator[str]:
        """Yield the URL of a new copy of a template, completely written to disk."""
        async with self._server.database(template) as url:
            await execute(plain_url(url), "CHECKPOINT")
            yield plain_url(url)


class Sqlite:
    """SQLite files in a folder; no process has to be measured."""

    pid = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @asynccontextmanager
    async def template(self, users: Path | None) -> AsyncIterator[str]:
        """Yield the path of a migrated database that contains the users of a file."""
        path = self._folder / "template.db"
        await asyncio.to_thread(migrations.upgrade, f"sqlite+aiosqlite:///{path}")
        if users:
            with closing(sqlite3.connect(path)) as connection, connection, users.open() as lines:
                connection.executemany(INSERT_USER, (line.rstrip("\n").split("\t") for line in lines))
        yield str(path)

    @asynccontextmanager
    async def database(self, template: str) -> AsyncIterator[str]:
        """Yield the URL of a new copy of a template."""
        path = shutil.copy(template, self._folder / "roster.db")
        yield f"sqlite:///{path}"
        for file in self._folder.glob("roster.db*"):
            file.unlink()


async def scalar(url: str, query: str) -> Any:
    """Return the single value that a query returns."""
    database = Database(Settings(database_url=url))
    async with database.read() as session:
        value = await session.scalar(text(query))
    await database.close()
    return value


def _postmaster(folder: str) -> int:
    return int(Path(folder, "postmaster.pid").read_text().split()[0])


def plain_url(url: str) -> str:
    """Return the URL without SQLAlchemy's driver, for psql and the service."""
    return url.replace("+asyncpg", "")


async def execute(url: str, *statements: str) -> list[Any]:
    """Execute statements, and return the rows of the last one."""
    connection = await asyncpg.connect(url)
    try:
        rows = [await connection.fetch(statement) for statement in statements]
        return rows[-1] if rows else []
    finally:
        await connection.close()
