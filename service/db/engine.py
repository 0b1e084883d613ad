"""Database: the engines and their pools, the unit of work, and the door for reads."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from math import ceil
from typing import Any
from urllib.parse import urlencode
from weakref import WeakSet

import asyncpg
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from service.auth.caller import current_share
from service.db import interruptible, revisions
from service.db.base import ReadSession, Session
from service.db.cancelled import keep_connections_of_cancelled_reads
from service.db.errors import may_have_committed, translate_errors
from service.db.pool import MeasuredPool, measure_pool
from service.db.statements import measure_statements
from service.errors import OutcomeUnknown, PoolExhausted, QuotaExceeded, RosterError
from service.files import create_database
from service.metrics import POOL_TIMEOUTS, POOL_WAITING
from service.settings import Settings
from service.shares import FairSemaphore, LoopTurns

# Two loads, or a load and a call, that want the same row: wait so long, then roll back and try again.
LOCK_TIMEOUT_SECONDS = 5
BULK_POOL_TIMEOUT_SECONDS = 60
SQLITE_BUSY_TIMEOUT_SECONDS = 5
# A caller may hold a quarter of the connections that the others leave free: 5 of 20. While ten read a whole
# table on two cores, another caller's GetUser takes 130 ms, with five 50 to 90 ms, at rest 8 ms (p99).
CONNECTIONS_PART = 4
SQLITE_READERS_PART = 8  # 3 of 20: here they are threads of this process
BULK_PART = 2  # 3 of 5: one stream writes three batches at a time
# More than a batch has, so that a COPY never waits for room.
WRITE_BUFFER_BYTES = 8 << 20

# On DEBUG it logs parameters: hashes of passwords, and contents.
logging.getLogger("aiosqlite").setLevel(logging.WARNING)


class CancelledAfterCommit(asyncio.CancelledError):
    """The caller was cancelled during its commit, which succeeded: what it wrote is stored."""


class Database:
    """The database of the service.

    `begin()` opens the unit of work: a clean exit commits, an exception rolls back. `bulk()` is the
    same on an engine of its own, so that loads can't starve calls. `read()` opens no transaction:
    each statement sees what was committed before it. All three share their connections fairly among
    callers. A task that holds a connection must not open a second one: with its share used up it would
    wait for itself.
    """

    def __init__(self, settings: Settings) -> None:
        make = _Sqlite if settings.is_embedded else _PostgreSQL
        self._engines = make(settings)
        self.is_sqlite = settings.is_embedded
        # For those who convert many rows: sixteen exports would keep the event loop from all other calls.
        self.loop_turns = LoopTurns()

    @property
    def engine(self) -> AsyncEngine:
        """The engine behind `begin()`, for migrations and for measuring."""
        return self._engines.writer

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Session]:
        """Open a read-write unit of work; raises domain errors for driver errors."""
        with translate_errors():
            async with self._engines.turn(), _session(self._engines.writer) as session:
                yield session
                await _commit(session)

    @asynccontextmanager
    async def bulk(self) -> AsyncIterator[Session]:
        """Open a unit of work for a batch; it waits for its turn for a minute."""
        with translate_errors():
            async with (
                self._engines.bulk_turn(),
                _session(self._engines.bulk) as session,
            ):
                yield session
                await _commit(session)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[ReadSession]:
        """Open a session for reading; it holds a connection, but no transaction."""
        with translate_errors():
            async with self._engines.read_turn(), _session(self._engines.reader) as session:
                yield session

    async def ping(self) -> None:
        """Raise DatabaseUnavailable (or its kin) unless the database answers a query."""
        async with self.read() as session:
            await session.execute(select(1))

    async def close(self) -> None:
        """Close all connections; without it a process on SQLite can hang at its end."""
        for engine in {self._engines.writer, self._engines.reader, self._engines.bulk}:
            await engine.dispose()


class _PostgreSQL:
    def __init__(self, settings: Settings) -> None:
        self.writer = self._engine(
            settings,
            "calls",
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            pool_timeout=settings.pool_timeout,
        )
        # The same pool; with AUTOCOMMIT a read is one round trip instead of three.
        self.reader = self.writer.execution_options(isolation_level="AUTOCOMMIT")
        keep_connections_of_cancelled_reads(self.writer)
        self.bulk = self._engine(
            settings,
            "bulk",
            pool_size=settings.bulk_connections,
            max_overflow=0,
            pool_timeout=BULK_POOL_TIMEOUT_SECONDS,
            # A batch is looked up by index. Otherwise 5,000 updates of 200,000 rows are planned as a merge
            # with all of them: 17 µs a row instead of 10.
            planner={"enable_mergejoin": "off", "enable_hashjoin": "off"},
            lock_timeout=LOCK_TIMEOUT_SECONDS,
        )
        connections = settings.pool_size + settings.max_overflow
        self._turns = _Turns("calls", connections, settings.pool_timeout)
        self._bulk_turns = _Turns("bulk", settings.bulk_connections, BULK_POOL_TIMEOUT_SECONDS, BULK_PART)

    @staticmethod
    def _engine(
        settings: Settings,
        name: str,
        *,
        lock_timeout: int = 0,
        planner: Mapping[str, str] | None = None,
        **pool: Any,
    ) -> AsyncEngine:
        timeout = f"{ceil(settings.statement_timeout * 1000)}ms"  # 0 would be none
        return _measured(
            settings.database_url,
            name,
            **pool,
            pool_recycle=settings.pool_recycle,
            pool_pre_ping=settings.pool_pre_ping,
            connect_args={
                "async_creator_fn": connect,
                "timeout": settings.connect_timeout,
                # The server's own timeout comes first; this one is for a server that is gone.
                "command_timeout": settings.statement_timeout + 5,
                "server_settings": {
                    # `roster migrate --contract` looks for sessions of servers that can't use its result.
                    "application_name": f"roster {revisions.head()}",
                    "statement_timeout": timeout,
                    "idle_in_transaction_session_timeout": timeout,
                    "lock_timeout": f"{lock_timeout}s",
                    **(planner or {}),
                },
            },
        )

    def turn(self) -> AbstractAsyncContextManager[None]:
        return self._turns.turn()

    def read_turn(self) -> AbstractAsyncContextManager[None]:
        return self._turns.turn()

    def bulk_turn(self) -> AbstractAsyncContextManager[None]:
        # The batches of a stream wait for each other's commits. They are of one caller, so they get their
        # turns in order, and whatever the caller's share is, the first of them waits for no other.
        return self._bulk_turns.turn()


class _Sqlite:
    def __init__(self, settings: Settings) -> None:
        create_database(settings.database_url)
        options: dict[str, Any] = {
            "connect_args": {
                "async_creator_fn": partial(interruptible.connect, settings.statement_timeout),
                "timeout": min(SQLITE_BUSY_TIMEOUT_SECONDS, settings.statement_timeout),
                "factory": _RollingBack,
            },
        }
        self.writer = self.bulk = _measured(settings.database_url, "writer", pool_size=1, **options)
        self.reader = _measured(
            settings.database_url,
            "readers",
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            pool_timeout=settings.pool_timeout,
            isolation_level="AUTOCOMMIT",
            **options,
        )
        event.listen(self.writer.sync_engine, "connect", _prepare_writer)
        event.listen(self.writer.sync_engine, "begin", _begin_immediate)
        event.listen(self.reader.sync_engine, "connect", _prepare_reader)
        for engine in (self.writer, self.reader):
            event.listen(engine.sync_engine, "handle_error", interruptible.discard_interrupted)
        readers = settings.pool_size + settings.max_overflow
        self._read_turns = _Turns("readers", readers, settings.pool_timeout, SQLITE_READERS_PART)
        self._write_turns = _Turns("writer", 1, settings.pool_timeout)

    def turn(self) -> AbstractAsyncContextManager[None]:
        return self._write_turns.turn()

    def read_turn(self) -> AbstractAsyncContextManager[None]:
        return self._read_turns.turn()

    def bulk_turn(self) -> AbstractAsyncContextManager[None]:
        return self._write_turns.turn(BULK_POOL_TIMEOUT_SECONDS)


class _Turns:
    """The turns that callers take at the connections of a pool, or at writing."""

    def __init__(self, pool: str, size: int, timeout: float, part: int = CONNECTIONS_PART) -> None:
        self._pool = pool
        self._shares = FairSemaphore(size, part)
        self._timeout = timeout

    @asynccontextmanager
    async def turn(self, timeout: float | None = None) -> AsyncIterator[None]:
        """Take a turn; raises QuotaExceeded or PoolExhausted after `timeout` seconds."""
        caller = current_share()
        if not self._shares.try_acquire(caller):
            await self._wait(caller, timeout or self._timeout)
        try:
            yield
        finally:
            self._shares.release(caller)

    async def _wait(self, caller: str, timeout: float) -> None:
        try:
            with POOL_WAITING.labels(self._pool).track_inprogress():
                await self._shares.acquire(caller, timeout=timeout)
        except TimeoutError:
            POOL_TIMEOUTS.labels(self._pool).inc()
            raise self._refusal(caller) from None

    def _refusal(self, caller: str) -> RosterError:
        if self._shares.free and self._shares.is_capped(caller):
            return QuotaExceeded(
                f"this caller's other calls hold {self._shares.held(caller)} of {self._shares.size} "
                "connections to the database, which is its share; nothing was done, wait until some of them "
                "have ended"
            )
        return PoolExhausted("the database is busy with other calls; nothing was done, try again")


def _measured(url: str, name: str, **options: Any) -> AsyncEngine:
    engine = create_async_engine(
        url, poolclass=MeasuredPool, pool_logging_name=name, hide_parameters=True, **options
    )
    measure_pool(engine, name)
    measure_statements(engine)
    return engine


async def connect(**options: Any) -> Any:
    """Open a connection to PostgreSQL; its URL may have libpq's parameters of TLS; `ssl` is `sslmode`."""
    tls = {name: options.pop(name) for name in list(options) if name.startswith("ssl")}
    if "ssl" in tls:
        tls["sslmode"] = tls.pop("ssl")
    try:
        # asyncpg knows most of them in a DSN only; what else is in one is overridden by the options.
        connection = await asyncpg.connect(f"postgresql://?{urlencode(tls)}", **options)
    except TimeoutError as error:  # not that of a statement: nothing was sent
        raise ConnectionError("the database did not answer in time") from error
    # A COPY that waits for room isn't told that the connection is lost, or its time over: it would for ever.
    connection._transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)  # noqa: SLF001
    return connection


class _RollingBack(sqlite3.Connection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, *args: Any) -> Any:
        cursor = super().cursor(*args)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        # A statement that a cancelled call left half-read keeps a closed connection alive, and so would
        # its transaction the writer's lock. If it was interrupted, it also interrupts the rollback.
        for cursor in list(self._cursors):
            cursor.close()
        try:
            self.rollback()
        finally:
            super().close()


def _prepare_writer(connection: Any, record: Any) -> None:  # noqa: ARG001
    connection.isolation_level = None  # the driver would BEGIN by itself, and late
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _prepare_reader(connection: Any, record: Any) -> None:  # noqa: ARG001
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _begin_immediate(connection: Any) -> None:
    # A deferred BEGIN that writes later fails at once when another process writes, whatever the timeout.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _session(engine: AsyncEngine) -> Session:
    return Session(ReadSession(async_sessionmaker(engine, expire_on_commit=False, autoflush=False)()))


async def _commit(session: AsyncSession) -> None:
    """Commit, to the end even where the caller is gone, so that the outcome is known."""
    task = asyncio.ensure_future(session.commit())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if task.exception() is None:
            raise CancelledAfterCommit from None
        raise
    except Exception as error:
        if may_have_committed(error):
            raise OutcomeUnknown(
                "the connection to the database broke during the commit; read before you write again, "
                "or send a request_id, with which it is safe to repeat"
            ) from error
        raise
