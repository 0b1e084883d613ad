"""Connections of a pool for compiled statements, without SQLAlchemy's session."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import cast

from sqlalchemy import PoolProxiedConnection, QueuePool
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

# A connection is kept for so long for the next statement. To give it back to the pool and take another one
# takes 45 µs, or 100 between other calls, and on SQLite a round trip to the driver's thread.
KEEP_SECONDS = 0.05


class DriverConnections:
    """Takes connections from a pool, and keeps them for a moment after their last statement.

    The pool checks, counts and replaces them like all others; it has at most `size`.
    """

    def __init__(self, engine: AsyncEngine, size: int) -> None:
        self._pool = cast("QueuePool", engine.pool)
        self._size = size
        self._kept: list[PoolProxiedConnection] = []
        self._giving_back: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[PoolProxiedConnection]:
        """Open a connection; after an error it goes back to the pool at once, which resets or replaces it."""
        connection = self._kept.pop() if self._kept else await greenlet_spawn(self._pool.connect)
        try:
            yield connection
        except BaseException:
            # It may wait for the end of a cancelled read. If that is interrupted, SQLAlchemy closes the
            # connection.
            await greenlet_spawn(connection.close)
            raise
        if self._pool.checkedout() < self._size:
            self._keep(connection)
        else:  # others may be waiting
            await greenlet_spawn(connection.close)

    async def make_room(self) -> None:
        """Give a kept connection back if the pool has no other, before somebody takes one from the pool."""
        if self._kept and self._pool.checkedout() >= self._size:
            await greenlet_spawn(self._kept.pop().close)

    async def close(self) -> None:
        """Give all connections back."""
        if self._giving_back:
            self._giving_back.cancel()
            await asyncio.wait([self._giving_back])
        await self.give_back()

    async def give_back(self) -> int:
        """Give back what is kept, and return the number of idle connections in the pool."""
        while self._kept:
            await greenlet_spawn(self._kept.pop().close)
        return self._pool.checkedin()

    def _keep(self, connection: PoolProxiedConnection) -> None:
        self._kept.append(connection)
        if self._giving_back is None or self._giving_back.done():
            self._giving_back = asyncio.create_task(self._give_back_soon(), context=Context())

    async def _give_back_soon(self) -> None:
        while self._kept:
            await asyncio.sleep(KEEP_SECONDS)
            await self.give_back()
