"""Keeps the connection of a cancelled read on PostgreSQL; only the statement and its transaction end.

SQLAlchemy closes the connection of a cancelled statement. PostgreSQL starts a process for each new one, so a
caller with slow reads and short deadlines would keep both sides busy with reconnecting. asyncpg cancels the
statement in the database, or closes the connection if it can't. It is enough to wait for that before the
connection goes back to the pool.
"""

import asyncio
from typing import Any

import asyncpg
from sqlalchemy import AdaptedConnection, Connection, ExceptionContext, PoolResetState, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

READS = "roster_reads"  # the option of an engine that reads in transactions
# PostgreSQL ends a cancelled statement in milliseconds, but a server that is stopped never answers.
END_SECONDS = 2
_CANCELLED = "statement was cancelled"


def keep_connections_of_cancelled_reads(engine: AsyncEngine) -> None:
    """Make an engine that uses asyncpg keep the connections of cancelled reads."""
    event.listen(engine.sync_engine, "handle_error", _handle)
    event.listen(engine.sync_engine, "reset", _wait_for_end)


def keep_cancelled(info: dict[str, Any]) -> None:
    """Keep a connection, with this `info`, whose read was cancelled: it is used again once that has ended."""
    info[_CANCELLED] = True


def _handle(failure: ExceptionContext) -> None:
    connection = failure.connection
    is_cancelled = isinstance(failure.original_exception, asyncio.CancelledError)
    if connection and is_cancelled and _is_read(connection) and not _is_closed(connection):
        keep_cancelled(connection.info)
        failure.is_disconnect = False


def _is_read(connection: Connection) -> bool:
    options = connection.get_execution_options()
    return options.get("isolation_level") == "AUTOCOMMIT" or bool(options.get(READS))


def _is_closed(connection: Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    return bool(driver.is_closed())


def _wait_for_end(connection: AdaptedConnection, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    # An error here makes SQLAlchemy close the connection.
    if record.info.pop(_CANCELLED, False) and state.asyncio_safe and not state.terminate_only:
        connection.run_async(_end)


async def _end(driver: "asyncpg.Connection[Any]") -> None:
    # Both wait for the end of the statement. A failed transaction accepts nothing but its end.
    await driver.execute("ROLLBACK" if driver.is_in_transaction() else "SELECT 1", timeout=END_SECONDS)
