"""A scratch schema of PostgreSQL in which to try things, and the connections that do."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import asyncpg

from service.db import conninfo
from service.db.connect import connect
from service.db.errors import cause_of
from service.variables import environment

PREFIX = "roster_probe_"
TIMEOUT_SECONDS = 5.0  # of connecting, and of each statement
SHORT_TIMEOUT = "100ms"  # of statements that must run into it
LOCK_NOT_AVAILABLE = "55P03"


class Session:
    """A connection of a check."""

    def __init__(self, driver: Any, schema: str) -> None:
        self.driver = driver
        self._schema = schema

    async def run(self, *statements: str) -> None:
        """Run statements one by one."""
        for statement in statements:
            await self.driver.execute(self.named(statement))

    async def value(self, query: str, *arguments: Any) -> Any:
        """Return the first value of the first row of a query."""
        return await self.driver.fetchval(self.named(query), *arguments)

    async def copy(self, table: str, lines: str, columns: Sequence[str]) -> None:
        """COPY lines of text, as the service does."""

        async def source() -> AsyncIterator[bytes]:
            yield lines.encode()

        schema = self._schema
        await self.driver.copy_to_table(table, schema_name=schema, source=source(), columns=columns)

    async def fails(self, statement: str, code: str) -> bool:
        """Return whether a statement ends with this SQLSTATE; False if it succeeds."""
        try:
            await self.run(statement)
        except asyncpg.PostgresError as error:
            if error.sqlstate == code:
                return True
            raise
        return False

    async def waits(self, *statements: str) -> bool:
        """Return whether the last statement of a transaction waits for a lock of another session."""
        transaction = self.driver.transaction()
        await transaction.start()
        try:
            await self.run(f"SET LOCAL lock_timeout = '{SHORT_TIMEOUT}'", *statements[:-1])
            return await self.fails(statements[-1], LOCK_NOT_AVAILABLE)
        finally:
            await transaction.rollback()

    def named(self, statement: str) -> str:
        return statement.replace("scratch.", f"{self._schema}.")


@dataclass(frozen=True)
class Scratch:
    """A schema to try things in."""

    url: str
    schema: str

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Open a connection, and roll back what it leaves open."""
        driver = await open_connection(self.url)
        try:
            yield Session(driver, self.schema)
        finally:
            await close(driver)


class NoScratchSchema(Exception):
    """No schema can be created, so nothing can be tried."""


class LeftBehind(Exception):
    """The scratch schema could not be dropped."""


@asynccontextmanager
async def scratch_schema(url: str) -> AsyncIterator[Scratch]:
    """Create a schema, and drop it however the block ends.

    Raises NoScratchSchema, and LeftBehind if the database has gone meanwhile.
    """
    schema = f"{PREFIX}{token_hex(8)}"
    try:
        await _create(url, schema)
        yield Scratch(url, schema)
    finally:
        try:
            await _drop(url, schema)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise LeftBehind(f"{left_behind(schema)}: {cause_of(error)}") from None


async def _create(url: str, schema: str) -> None:
    driver = await open_connection(url)
    try:
        await _begin(driver)
        await driver.execute(f"CREATE SCHEMA {schema}")
        await driver.execute("COMMIT")
    except asyncpg.InsufficientPrivilegeError as error:
        raise NoScratchSchema(
            f"nothing was probed, because this role may not create a schema ({error}); probe with a role "
            "that may, or let the owner of the database run GRANT CREATE ON DATABASE … TO …, and REVOKE it "
            "afterwards"
        ) from None
    finally:
        await close(driver)


async def _begin(driver: Any) -> None:
    try:
        await driver.execute("BEGIN")
    except asyncpg.PostgresError as error:
        raise NoScratchSchema(
            f"nothing was probed, because no transaction can be opened ({error}); if this is a pooler, set "
            "its pool_mode to transaction or session"
        ) from None


def left_behind(schema: str) -> str:
    """Return the sentence about a schema that was not dropped."""
    return f"the schema {schema} of a probe was not dropped; run DROP SCHEMA {schema} CASCADE"


async def _drop(url: str, schema: str) -> None:
    driver = await open_connection(url)
    try:
        await driver.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    finally:
        await close(driver)


async def open_connection(url: str) -> Any:
    """Open a connection that any pooler can pass on; raises the errors of `connect`."""
    parameters = conninfo.read(url, environment())
    return await connect(
        parameters,
        timeout=TIMEOUT_SECONDS,
        command_timeout=TIMEOUT_SECONDS,
        statement_cache_size=0,  # a pooler in transaction mode can't keep named statements
        server_settings={"application_name": "roster doctor", **conninfo.startup_settings(parameters)},
        settings=conninfo.session_settings(parameters),
    )


async def close(driver: Any) -> None:
    """Close a connection, after the end of a statement that was cancelled."""
    try:
        await driver.close(timeout=TIMEOUT_SECONDS)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        driver.terminate()
