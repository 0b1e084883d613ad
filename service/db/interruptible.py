"""Statements of SQLite that end: at their timeout, and when their caller is cancelled.

SQLite has no timeout for statements. aiosqlite runs them in a thread, which goes on after its caller is
cancelled.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import aiosqlite
from sqlalchemy import ExceptionContext

from service.db.errors import code_of

INTERRUPTED = "SQLITE_INTERRUPT"
AGAIN_SECONDS = 0.01
ROWS_AT_A_TIME = 64  # aiosqlite's own default


class InterruptibleConnection(aiosqlite.Connection):
    """A connection whose statements end after `statement_timeout` seconds, or with their caller."""

    def __init__(self, open_file: Callable[[], sqlite3.Connection], statement_timeout: float) -> None:
        super().__init__(open_file, ROWS_AT_A_TIME)
        self._thread.daemon = True  # otherwise a connection left open keeps the process alive
        self._statement_timeout = statement_timeout

    async def commit(self) -> None:
        """Commit to the end, so that the outcome is known."""
        await self._finish(self._conn.commit)

    async def rollback(self) -> None:
        """Roll back to the end."""
        await self._finish(self._conn.rollback)

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if fn == self._conn.close:  # it rolls back, and an interrupted rollback keeps the writer's lock
            return await self._finish(fn)
        statement = _Statement(self._conn)
        timer = asyncio.get_running_loop().call_later(self._statement_timeout, statement.stop)
        try:
            return await self._finish(statement.run, partial(fn, *args, **kwargs))
        except asyncio.CancelledError:
            statement.stop()
            raise
        finally:
            timer.cancel()

    async def _finish(self, function: Callable[..., Any], *args: Any) -> Any:
        return await super()._execute(function, *args)  # type: ignore[no-untyped-call]


class _Statement:
    """One call in the connection's thread. `stop` is called in the event loop's and ends no other call."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = Lock()
        self._is_running = False
        self._is_stopped = False

    def run(self, function: Callable[[], Any]) -> Any:
        with self._lock:
            if self._is_stopped:
                raise _interrupted()
            self._is_running = True
        try:
            return function()
        finally:
            with self._lock:
                self._is_running = False

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            if self._is_running:
                self._connection.interrupt()
                # Between two rows of an executemany no statement runs, and an interrupt is lost.
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self.stop)


def connect(statement_timeout: float, file: str, **options: Any) -> InterruptibleConnection:
    """Return a connection to a file, to be awaited; the options are those of `sqlite3.connect`."""
    return InterruptibleConnection(partial(sqlite3.connect, file, **options), statement_timeout)


def discard_interrupted(failure: ExceptionContext) -> None:
    """Close the connection of an interrupted statement: SQLite has rolled its transaction back.

    Otherwise what follows in the session would commit by itself. A listener of `handle_error`.
    """
    if code_of(failure.original_exception) == INTERRUPTED:
        failure.is_disconnect = True
        failure.invalidate_pool_on_disconnect = False


def _interrupted() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("interrupted")
    error.sqlite_errorname = INTERRUPTED
    return error
