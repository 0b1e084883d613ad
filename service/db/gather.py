"""Gather: concurrent look-ups of single rows in one statement."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from functools import partial
from operator import attrgetter
from typing import Any

import asyncpg
from sqlalchemy import ARRAY, bindparam, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute

from service.db.engine import Database
from service.errors import RosterError

MAX_KEYS = 100  # contents of 1 MiB each may come back
# A connection is kept while calls come; then it goes back to the pool, where others wait for one.
MAX_STATEMENTS = 100

Column = InstrumentedAttribute[Any]
Waiting = tuple[Any, asyncio.Future[Any]]
Fetch = Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]


class Gather:
    """Looks rows up by a unique column: calls that come while a statement is under way share the next one.

    So each sees what was committed before it came. One that leaves takes no other with it; a statement
    that all its callers have left is cancelled.
    """

    def __init__(self, database: Database, key: Column, columns: Sequence[Column]) -> None:
        self._database = database
        self._lookup = _Lookup(key, columns)
        self._key_of = attrgetter(key.key)
        self._waiting: list[Waiting] = []
        self._in_flight: list[Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: Any) -> Any | None:
        """Return the columns of the row with this key, None where there is none.

        Raises what `Database.read()` does, each caller an error of its own.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, future))
        if self._task is None:
            self._start()
        try:
            return await future
        except asyncio.CancelledError:
            self._cancel_where_all_left()
            raise

    async def close(self) -> None:
        """Cancel what is under way, and wait for its end."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting = []
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _start(self) -> None:
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        async with self._database.read() as session:
            connection = await session.connection()
            try:
                fetch = await self._lookup.on(connection)
                for _ in range(MAX_STATEMENTS):
                    if not self._waiting:
                        return
                    await self._answer(fetch)
            except BaseException:
                # SQLAlchemy doesn't see what the driver does: a broken connection would go back to the pool.
                await connection.invalidate()
                raise

    async def _answer(self, fetch: Fetch) -> None:
        self._in_flight, self._waiting = self._waiting[:MAX_KEYS], self._waiting[MAX_KEYS:]
        keys = {key for key, future in self._in_flight if not future.done()}
        rows = {self._key_of(row): row for row in await fetch(list(keys))} if keys else {}
        for key, future in self._in_flight:
            if not future.done():
                future.set_result(rows.get(key))
        self._in_flight = []

    def _cancel_where_all_left(self) -> None:
        callers = self._in_flight or self._waiting
        task = self._task
        # A second cancel would cut off the first one's cleaning up.
        if task and not task.cancelling() and all(future.cancelled() for _, future in callers):
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        unanswered, self._in_flight = self._in_flight, []
        error = None if task.cancelled() else task.exception()
        if error and not unanswered:  # no connection was had
            unanswered, self._waiting = self._waiting, []
        for _, future in unanswered:
            if error and not future.done():
                future.set_exception(_own(error))
            future.cancel()
        self._task = None
        if self._waiting:
            self._start()


class _Record(asyncpg.Record):
    """A row whose columns are attributes, as SQLAlchemy's are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class _Lookup:
    """The statement, in each database's way."""

    def __init__(self, key: Column, columns: Sequence[Column]) -> None:
        self._select = select(*columns).where(key.in_(bindparam("keys", expanding=True)))
        # The driver itself: through SQLAlchemy a statement costs 250 µs more, and often answers two calls.
        array = bindparam("keys", type_=ARRAY(key.type))
        statement = select(*columns).where(key == func.any(array))
        self._sql = str(
            statement.compile(dialect=postgresql.asyncpg.dialect())  # type: ignore[no-untyped-call]
        )

    async def on(self, connection: AsyncConnection) -> Fetch:
        """Return what looks keys up on a connection."""
        if connection.dialect.name == "sqlite":
            return partial(self._through_sqlalchemy, connection)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        return partial(self._through_asyncpg, driver)

    async def _through_sqlalchemy(self, connection: AsyncConnection, keys: Sequence[Any]) -> Sequence[Any]:
        return (await connection.execute(self._select, {"keys": keys})).all()

    async def _through_asyncpg(self, driver: Any, keys: Sequence[Any]) -> Sequence[Any]:
        try:
            found: Sequence[Any] = await driver.fetch(self._sql, keys, record_class=_Record)
        except asyncpg.InterfaceError as error:  # it was closed before the statement went out
            raise ConnectionError(str(error)) from error
        return found


def _own(error: BaseException) -> Exception:
    """Return an error for one caller: one object raised by many would gather all their tracebacks."""
    own = copy(error) if isinstance(error, RosterError) else RuntimeError("a look-up failed")
    own.__cause__ = error
    return own
