"""Keeps the connection of a cancelled read on PostgreSQL; only the statement ends.

SQLAlchemy closes the connection of a cancelled statement. PostgreSQL starts a process for each new one, so a
caller with slow reads and short deadlines would keep both sides busy with reconnecting. asyncpg cancels the
statement in the database, or closes the connection if it can't. It is enough to wait for that before the
connection goes back to the pool.
"""

import asyncio

from sqlalchemy import AdaptedConnection, Connection, ExceptionContext, PoolResetState, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

_CANCELLED = "statement was cancelled"


def keep_connections_of_cancelled_reads(engine: AsyncEngine) -> None:
    """Make an engine that uses asyncpg keep the connections of cancelled reads."""
    event.listen(engine.sync_engine, "handle_error", _handle)
    event.listen(engine.sync_engine, "reset", _wait_for_end)


def keep_if_cancelled(connection: Connection, error: BaseException) -> bool:
    """Return whether the connection can be kept: the error is only the cancellation of a read."""
    is_read = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    is_kept = isinstance(error, asyncio.CancelledError) and is_read and connection.dialect.driver == "asyncpg"
    if is_kept:
        connection.info[_CANCELLED] = True
    return is_kept


def _handle(failure: ExceptionContext) -> None:
    if failure.connection and keep_if_cancelled(failure.connection, failure.original_exception):
        failure.is_disconnect = False


def _wait_for_end(connection: AdaptedConnection, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    # An error here makes SQLAlchemy close the connection.
    if record.info.pop(_CANCELLED, False) and state.asyncio_safe and not state.terminate_only:
        connection.run_async(lambda driver: driver.execute("SELECT 1"))
