"""LookupBatcher: concurrent look-ups of single rows in one statement."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from copy import copy
from operator import itemgetter
from time import perf_counter
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute

from service.auth.caller import current_share
from service.db.dialect import is_one_of_keys
from service.db.driver import DriverQuery
from service.db.engine import Database
from service.db.statements import tell
from service.errors import DatabaseUnavailable, RosterError
from service.metrics import GATHERED_READS
from service.shares import FairQueue

# Contents of 1 MiB each may come back; those who ask for many at once ask for small rows.
MAX_KEYS = 100
# A connection is kept while calls come; then it goes back to the pool, where others wait for one.
MAX_STATEMENTS = 100
# A statement for two costs nearly what one for thirty does. So it leaves when so many turns of the event loop
# have brought nobody else: a loop with nothing to do takes 40 µs for them, and one that is busy has calls at
# hand. At 64 in flight, PostgreSQL: 30 calls a statement instead of 2, and 1.8 times the rate.
QUIET_TURNS = 30
MAX_GATHER_SECONDS = 0.005  # where each turn is long

Column = InstrumentedAttribute[Any]
Rows = Mapping[Any, Any]
Waiting = tuple[Sequence[Any], asyncio.Future[Rows]]


class LookupBatcher:
    """Looks rows up by a unique column: calls that come while a statement is under way share the next one.

    So each sees what was committed before it came. One that leaves takes no other with it; a statement
    that all its callers have left is cancelled. Callers who wait go with the next statement in turn, so that
    one with many look-ups does not hold up the others.
    """

    def __init__(self, database: Database, key: Column, columns: Sequence[Any]) -> None:
        dialect = database.engine.dialect
        self._database = database
        self._query = DriverQuery(select(*columns).where(is_one_of_keys(key, dialect)), dialect)
        self._key_of = itemgetter([column.key for column in columns].index(key.key))
        self._waiting: FairQueue[Waiting] = FairQueue()
        self._in_flight: list[Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: Any) -> Any | None:
        """Return the columns of the row with this key, None where there is none; raises as `get_many`."""
        return (await self.get_many([key])).get(key)

    async def get_many(self, keys: Sequence[Any]) -> Rows:
        """Return the columns of the rows with these keys, and perhaps others, by their keys.

        Raises what `Database.read()` does, each caller an error of its own.
        """
        future: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._waiting.put(current_share(), (keys, future))
        if self._task is None:
            self._start()
        began = perf_counter()
        try:
            return await future
        except asyncio.CancelledError:
            self._cancel_where_all_left()
            raise
        finally:
            tell(self._query.sql, perf_counter() - began)

    async def close(self) -> None:
        """Cancel what is under way, and wait for its end."""
        for _, future in self._waiting.clear():
            future.cancel()
        if self._task:
            self._cancel(self._task)
            await asyncio.wait([self._task])

    def _start(self) -> None:
        # In no call's context: what it does is for many.
        self._task = asyncio.create_task(self._run(), context=Context())
        self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        try:
            await self._answer_all()
        except DatabaseUnavailable:
            if not self._in_flight:  # there was no connection to be had
                raise
            # The connection may be from before a restart of PostgreSQL, and so may others in the pool: what
            # fails through SQLAlchemy takes them all out.
            with suppress(RosterError):
                await self._database.ping()
            await self._answer_all()

    async def _answer_all(self) -> None:
        async with self._database.read() as session:
            connection = await session.connection()
            for _ in range(MAX_STATEMENTS):
                if not self._in_flight:
                    if not self._waiting:
                        return
                    await self._gather()
                    self._take()
                await self._answer(connection)

    async def _gather(self) -> None:
        """Wait until the event loop has nobody else to bring, 5 ms at most."""
        end, known = perf_counter() + MAX_GATHER_SECONDS, 0
        while known < len(self._waiting) < MAX_KEYS:
            known = len(self._waiting)
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
                if perf_counter() > end:
                    return

    async def _answer(self, connection: AsyncConnection) -> None:
        GATHERED_READS.observe(len(self._in_flight))
        keys = {key for asked, future in self._in_flight if not future.done() for key in asked}
        found = await self._query.rows(connection, keys=list(keys)) if keys else []
        rows = {self._key_of(row): row for row in found}
        for _, future in self._in_flight:
            if not future.done():
                future.set_result(rows)
        self._in_flight = []

    def _take(self) -> None:
        """Put look-ups in flight until they have keys enough."""
        number = 0
        while self._waiting and number < MAX_KEYS:
            lookup = self._waiting.get()
            self._in_flight.append(lookup)
            number += len(lookup[0])

    def _cancel_where_all_left(self) -> None:
        callers = self._in_flight or self._waiting
        task = self._task
        if task and all(future.cancelled() for _, future in callers):
            self._cancel(task)

    @staticmethod
    def _cancel(task: "asyncio.Task[None]") -> None:
        if not task.cancelling():  # a second cancel would cut off the first one's cleaning up
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        unanswered, self._in_flight = self._in_flight, []
        self._waiting.discard(_has_left)
        error = None if task.cancelled() else task.exception()
        if error and not unanswered:  # no connection was had
            unanswered = self._waiting.clear()
        for _, future in unanswered:
            if error and not future.done():
                future.set_exception(_own(error))
            future.cancel()
        self._task = None
        if self._waiting:
            self._start()


def _has_left(lookup: Waiting) -> bool:
    return lookup[1].done()


def _own(error: BaseException) -> Exception:
    """Return an error for one caller: one object raised by many would gather all their tracebacks."""
    own = copy(error) if isinstance(error, RosterError) else RuntimeError("a look-up failed")
    own.__cause__ = error
    return own
