"""The position of the primary in its write-ahead log, and the lag of a replica."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context

from sqlalchemy import literal_column, select

from roster.errors import RosterError
from service.consistency import Position
from service.db.base import Expression, Query
from service.db.errors import cause_of

log = logging.getLogger(__name__)

MAX_NOTED = 3600  # positions of the primary: an hour, at one a second
QUERY_SECONDS = 1  # then the callers that wait for the next query get their turn

CLUSTER = "(SELECT system_identifier FROM pg_control_system())"
# The first 8 digits of the name of a log file. pg_control_checkpoint() is late after a promotion.
PRIMARY_TIMELINE = "('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int"
PRIMARY_LSN = "pg_current_wal_insert_lsn()"


def select_sql(**columns: str) -> Query:
    """Return a statement that selects SQL expressions by name."""
    expressions: list[Expression] = [literal_column(sql).label(name) for name, sql in columns.items()]
    return select(*expressions)


# The columns of a Position.
POSITION = select_sql(cluster=CLUSTER, timeline=PRIMARY_TIMELINE, lsn=PRIMARY_LSN)


class PrimaryPosition:
    """The position of the primary in its log; `last` is the one that was read last.

    Callers share queries. Each query is sent after all of its callers have asked, so that the position is
    after everything that they had committed.
    """

    def __init__(self, query: Callable[[], Awaitable[Position]]) -> None:
        self.last: Position | None = None
        self._query = query
        self._waiting: list[asyncio.Future[Position | None]] = []
        self._task: asyncio.Task[None] | None = None

    async def current(self, seconds: float) -> Position | None:
        """Return the position, or None if it can't be read within this time."""
        future: asyncio.Future[Position | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), context=Context())
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await future
        return None

    async def close(self) -> None:
        """Cancel the query in flight."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, []
                position = await self._read()
                for future in asked:
                    if not future.done():
                        future.set_result(position)
        finally:
            self._task = None

    async def _read(self) -> Position | None:
        try:
            async with asyncio.timeout(QUERY_SECONDS):
                self.last = await self._query()
        except RosterError:  # it has been logged
            return None
        except Exception as error:  # noqa: BLE001 - such as a standby in place of the primary
            log.warning("the position of the primary can't be read: %s", cause_of(error))
            return None
        return self.last


class Lag:
    """The lag of a replica, from the positions of the primary that were noted over time."""

    def __init__(self) -> None:
        self._noted: deque[tuple[float, int]] = deque()  # LSNs that the replica has not replayed
        self._newest: Position | None = None
        self._replayed = 0

    def note(self, primary: Position, now: float) -> None:
        """Note the position of the primary."""
        # After a failover or a restore, positions that were lost would never be replayed.
        if self._newest and (self._newest[:2] != primary[:2] or self._newest > primary):
            self._noted.clear()
        self._newest = primary
        if len(self._noted) < MAX_NOTED:
            self._noted.append((now, primary.lsn))

    def measure(self, replayed: int | None, now: float) -> tuple[float, int]:
        """Return the lag in seconds and in bytes; `replayed` is None if the replica does not answer."""
        if replayed is not None:
            self._replayed = replayed
        while self._noted and self._noted[0][1] <= self._replayed:
            self._noted.popleft()
        if not (self._noted and self._newest):
            return 0, 0
        return now - self._noted[0][0], self._newest.lsn - self._replayed
