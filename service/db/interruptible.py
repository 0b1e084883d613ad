"""Interrupts SQLite statements at their timeout, and when their caller is cancelled.

SQLite has no statement timeout. aiosqlite runs statements in a thread, which continues after its caller was
cancelled.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import aiosqlite
from sqlalchemy import ExceptionContext

from service.db.errors import code_of

P = ParamSpec("P")
Ts = TypeVarTuple("Ts")
T = TypeVar("T")

INTERRUPTED = "SQLITE_INTERRUPT"
AGAIN_SECONDS = 0.01
ROWS_AT_A_TIME = 64  # aiosqlite's own default


class InterruptibleConnection(aiosqlite.Connection):
    """A connection that ends statements after `statement_timeout` seconds, or with their caller."""

    def __init__(self, open_file: Callable[[], sqlite3.Connection], statement_timeout: float) -> None:
        super().__init__(open_file, ROWS_AT_A_TIME)
        self._thread.daemon = True  # otherwise a connection left open keeps the process alive
        self._statement_timeout = statement_timeout

    async def commit(self) -> None:
        """Commit without interruption, so that the outcome is known."""
        await self._finish(self._conn.commit)

    async def rollback(self) -> None:
        """Roll back without interruption."""
        await self._finish(self._conn.rollback)

    async def _execute(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
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

    async def _finish(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        result: T = await super()._execute(function, *args)  # type: ignore[no-untyped-call]
        return result


class _Statement:
    """One call in the connection's thread. The event loop calls `stop`, which interrupts no other call."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = Lock()
        self._is_running = False
        self._is_stopped = False

    def run(self, function: Callable[[], T]) -> T:
        with self._lock:
            if self._is_stopped:
                raise _interruption()
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
    """Return a connection to a file, which must be awaited; the options are those of `sqlite3.connect`."""
    return InterruptibleConnection(partial(sqlite3.connect, file, **options), statement_timeout)


def discard_interrupted(failure: ExceptionContext) -> None:
    """Close the connection of an interrupted statement: SQLite has rolled its transaction back.

    Otherwise later statements of the session would commit by themselves. A listener of `handle_error`.
    """
    if code_of(failure.original_exception) == INTERRUPTED:
        failure.is_disconnect = True
        failure.invalidate_pool_on_disconnect = False


def _interruption() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("interrupted")
    error.sqlite_errorname = INTERRUPTED
    return error
