"""Database: engines, connection pools, units of work, and read sessions."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from math import ceil
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, ExceptionContext, PoolProxiedConnection, event, select
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from roster.errors import DatabaseUnavailable, OutcomeUnknown, PoolExhausted, QuotaExceeded, RosterError
from service.auth.caller import SYSTEM, current_share
from service.consistency import Position, Requirement, note_unknown_outcome
from service.db import interruptible, revisions
from service.db.base import ReadSession, Session
from service.db.cancelled import READS, keep_connections_of_cancelled_reads
from service.db.compiled import CompiledSelect
from service.db.connect import postgresql_engine
from service.db.distribution import find_distributed_tables, limit_waits_for_locks
from service.db.driver import DriverConnections
from service.db.errors import code_of, is_ending, may_have_committed, translate_errors
from service.db.failover import Failover
from service.db.pool import InstrumentedPool, measure_pool
from service.db.position import POSITION, PrimaryPosition
from service.db.replica import Replica, UsePrimary
from service.db.selection import Row
from service.db.sqlite_files import create_database
from service.db.statements import measure_statements
from service.metrics import POOL_TIMEOUTS, POOL_WAITING, READS_ON_PRIMARY
from service.settings import Settings
from service.shares import FairSemaphore, LoopTurns

# A batch that waits for a row lock of another load or call rolls back after this time, and tries again.
LOCK_TIMEOUT_SECONDS = 5
BULK_POOL_TIMEOUT_SECONDS = 60
# A new connection picks one of the replicas: it leaves one that has been promoted, and uses one that is back.
REPLICA_RECYCLE_SECONDS = 60
SQLITE_BUSY_TIMEOUT_SECONDS = 5
# A caller may hold a quarter of the connections that the others leave free: 5 of 20. Another caller's GetUser
# takes 8 ms at rest (p99, two cores), 50 to 90 ms while one caller reads whole tables on 5 connections, and
# 130 ms while it does so on 10.
CONNECTIONS_PART = 4
SQLITE_READERS_PART = 8  # 3 of 20: each is a thread of this process
BULK_PART = 2  # 3 of 5: one stream writes three batches at a time

NOT_REPLICATED = "08007"  # of `durability`
ResultT = TypeVar("ResultT")

# At DEBUG it logs parameters: password hashes and contents.
logging.getLogger("aiosqlite").setLevel(logging.WARNING)


class CancelledAfterCommit(asyncio.CancelledError):
    """The caller was cancelled during its commit, but the commit succeeded: the write is stored."""


class Database:
    """The database of the service.

    `begin()` opens a unit of work: a clean exit commits, an exception rolls back. A dry run is rolled back at
    its end too, so it can do what a write does and leaves nothing but gaps in ids. `bulk()` does the same on
    an engine of its own, so that loads can't starve calls. `read()` is for reading: each statement sees what
    was committed before it. It opens a transaction only behind a pooler that needs one. All of them share
    their connections fairly among callers. A task that holds a connection must not open a second one: once
    its caller's share is used up, it would wait for itself.
    """

    def __init__(self, settings: Settings) -> None:
        make = _Sqlite if settings.is_embedded else _PostgreSQL
        self._engines = make(settings)
        size = settings.pool_size + settings.max_overflow
        self._driver_connections = DriverConnections(self._engines.reader, size)
        self.is_sqlite = settings.is_embedded
        self.replica = self._replica(self._engines, size)  # None unless one is configured
        # For converting many rows: without it, sixteen exports would keep all other calls off the event loop.
        self.loop_turns = LoopTurns()

    @property
    def engine(self) -> AsyncEngine:
        """The engine of `begin()`, for migrations and for metrics."""
        return self._engines.writer

    @asynccontextmanager
    async def begin(self, *, is_dry_run: bool = False) -> AsyncIterator[Session]:
        """Open a read-write unit of work; raises domain errors for driver errors."""
        with translate_errors():
            async with self._engines.write_slot():
                if not self.is_sqlite:  # whose writer has a pool of its own
                    await self._driver_connections.make_room()
                async with _session(self._engines.writer) as session:
                    yield session
                    if not is_dry_run:
                        await _commit(session)

    @asynccontextmanager
    async def bulk(self) -> AsyncIterator[Session]:
        """Open a unit of work for a batch; it waits up to a minute for a connection."""
        with translate_errors():
            async with (
                self._engines.bulk_slot(),
                _session(self._engines.bulk) as session,
            ):
                await limit_waits_for_locks(session, LOCK_TIMEOUT_SECONDS)
                yield session
                await _commit(session)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[ReadSession]:
        """Open a read session, which holds a connection."""
        with translate_errors():
            async with self._engines.read_slot():
                await self._driver_connections.make_room()
                async with _session(self._engines.reader) as session:
                    yield session

    async def run(
        self, read: Callable[[ReadSession], Awaitable[ResultT]], requirement: Requirement | None
    ) -> ResultT:
        """Return the result of `read` with a read session, on a replica if one meets the requirement.

        If that fails, `read` runs again on the primary.
        """
        if self.replica and requirement:
            with suppress(UsePrimary):
                async with self.replica.session(requirement) as session:
                    return await read(ReadSession(session))
        self._count_read()
        async with self.read() as session:
            return await read(session)

    async def rows(
        self,
        query: CompiledSelect,
        *,
        share: str = "",
        requirement: Requirement | None = None,
        **values: Any,
    ) -> Sequence[Row]:
        """Return the rows of a compiled statement, on a replica if one meets the requirement.

        Without a requirement, or if that fails, they come from the primary. The connection is from the
        caller's share or from another one; the values are those of the statement's parameters.
        """
        if self.replica and requirement:
            with suppress(UsePrimary):
                async with self.replica.connection(requirement, share) as connection:
                    return await query.rows(connection, **values)
        self._count_read()
        return await self._rows(query, share, values)

    async def rows_of_log(self, query: CompiledSelect, **values: Any) -> Sequence[Row]:
        """Return the rows of the statement that reads the log, on the primary. It is not counted."""
        return await self._rows(query, "", values)

    async def _rows(self, query: CompiledSelect, share: str, values: Mapping[str, Any]) -> Sequence[Row]:
        """Return the rows of a compiled statement on the primary.

        It reads like a statement of `read()`, without a session, which takes 200 µs. If its connection was
        opened before a restart of PostgreSQL, it is sent once more.
        """
        connection = None
        try:
            async with self._driver(share) as connection:
                return await query.rows(connection, **values)
        except DatabaseUnavailable:
            if connection is None:  # none could be opened
                raise
        # The others may be as old. The first failure that SQLAlchemy sees removes all of them from the pool.
        idle = await self._driver_connections.give_back()
        with suppress(RosterError):
            for _ in range(idle):
                await self.ping()
        async with self._driver(share) as connection:
            return await query.rows(connection, **values)

    @asynccontextmanager
    async def _driver(self, share: str) -> AsyncIterator[PoolProxiedConnection]:
        with translate_errors():
            async with self._engines.read_slot(share), self._driver_connections.open() as connection:
                yield connection

    async def ping(self) -> None:
        """Query the database; raises a domain error, such as DatabaseUnavailable, if it does not answer."""
        async with self.read() as session:
            await session.execute(select(1))

    async def watch_forever(self) -> None:
        """Replace the connections if another server of PostgreSQL becomes the primary."""
        if self._engines.failover:
            await self._engines.failover.watch_forever()

    def doubt(self) -> None:
        """Find out soon whether another server has become the primary."""
        if self._engines.failover:
            self._engines.failover.doubt()

    def _replica(self, engines: "_PostgreSQL | _Sqlite", size: int) -> Replica | None:
        if engines.replica is None:
            return None
        query = CompiledSelect(POSITION, engines.replica.dialect)

        async def read_position() -> Position:
            [row] = await self._rows(query, SYSTEM, {})
            return Position(*row)

        return Replica(engines.replica, size, engines.replica_slot, PrimaryPosition(read_position))

    def _count_read(self) -> None:
        if self.replica:
            READS_ON_PRIMARY.inc()

    async def close(self) -> None:
        """Close all connections; otherwise a process that uses SQLite can hang at exit."""
        if self.replica:
            await self.replica.close()
        await self._driver_connections.close()
        for engine in {self._engines.writer, self._engines.reader, self._engines.bulk}:
            await engine.dispose()


class _PostgreSQL:
    def __init__(self, settings: Settings) -> None:
        # A pooler in transaction mode has the connections to the server, and changes them.
        self.failover = None if settings.pools_transactions else Failover(settings.database_url)
        admit = self.failover.admit if self.failover else None
        self.writer = self._engine(
            settings,
            "calls",
            pools_transactions=settings.pools_transactions,
            admit=admit,
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            pool_timeout=settings.pool_timeout,
        )
        # The same pool. With AUTOCOMMIT a read is one round trip instead of three. Behind a pooler in
        # transaction mode, only a transaction has timeouts.
        mode: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
        self.reader = self.writer.execution_options(**{READS: True} if settings.pools_transactions else mode)
        keep_connections_of_cancelled_reads(self.writer)
        self.bulk = self._engine(
            settings,
            "bulk",
            pools_transactions=settings.pools_transactions,
            admit=admit,
            pool_size=settings.bulk_connections,
            max_overflow=0,
            pool_timeout=BULK_POOL_TIMEOUT_SECONDS,
            # These settings make the planner look up a batch by index. Otherwise it plans 5,000 updates of
            # 200,000 rows as a merge with the whole table: 17 µs a row instead of 10.
            planner={"enable_mergejoin": "off", "enable_hashjoin": "off"},
            lock_timeout=LOCK_TIMEOUT_SECONDS,
        )
        if self.failover:
            self.failover.watch(self.writer)
            self.failover.watch(self.bulk)
        connections = settings.pool_size + settings.max_overflow
        self._slots = _Slots("calls", connections, settings.pool_timeout)
        self._bulk_slots = _Slots("bulk", settings.bulk_connections, BULK_POOL_TIMEOUT_SECONDS, BULK_PART)
        engines = [self.writer, self.bulk]
        self.replica: AsyncEngine | None = None
        if settings.replica_url:
            replica = self._engine(
                settings,
                "replica",
                url=settings.replica_url,
                pool_size=settings.pool_size,
                max_overflow=settings.max_overflow,
                pool_timeout=settings.pool_timeout,
                pool_recycle=min(settings.pool_recycle, REPLICA_RECYCLE_SECONDS),
                defaults={"load_balance_hosts": "random", "target_session_attrs": "any"},
            )
            keep_connections_of_cancelled_reads(replica)
            engines.append(replica)
            self.replica = replica.execution_options(isolation_level="AUTOCOMMIT")
            self._replica_slots = _Slots("replica", connections, settings.pool_timeout)
        find_distributed_tables(*engines)

    @staticmethod
    def _engine(
        settings: Settings,
        name: str,
        *,
        url: str = "",
        pools_transactions: bool = False,
        lock_timeout: int = 0,
        planner: Mapping[str, str] | None = None,
        **pool: Any,
    ) -> AsyncEngine:
        timeout = f"{ceil(settings.statement_timeout * 1000)}ms"  # 0 would be none
        engine = postgresql_engine(
            url or settings.database_url,
            **_pool_options(name),
            **{"pool_recycle": settings.pool_recycle, **pool},
            pool_pre_ping=settings.pool_pre_ping,
            timeout=settings.connect_timeout,
            # `roster migrate --contract` looks for sessions of servers that can't use its result.
            application_name=f"roster {revisions.head()}",
            pools_transactions=pools_transactions,
            settings={
                "statement_timeout": timeout,
                "idle_in_transaction_session_timeout": timeout,
                "lock_timeout": f"{lock_timeout}s",
                **(planner or {}),
            },
            # The server's own timeout expires first; this one is for a server that is gone.
            connect_args={"command_timeout": settings.statement_timeout + 5},
        )
        event.listen(engine.sync_engine, "handle_error", _discard_ending)
        return _measured(engine, name)

    def write_slot(self) -> AbstractAsyncContextManager[None]:
        return self._slots.hold()

    def read_slot(self, share: str = "") -> AbstractAsyncContextManager[None]:
        return self._slots.hold(share)

    def replica_slot(self, share: str) -> AbstractAsyncContextManager[None]:
        return self._replica_slots.hold(share)

    def bulk_slot(self) -> AbstractAsyncContextManager[None]:
        # The batches of a stream wait for each other's commits. They all belong to one caller, so they get
        # their slots in order, and a caller with any share at all gets one for its first batch.
        return self._bulk_slots.hold()


class _Sqlite:
    failover: None = None
    replica: None = None

    def __init__(self, settings: Settings) -> None:
        create_database(settings.database_url)
        options: dict[str, Any] = {
            "connect_args": {
                "async_creator_fn": partial(interruptible.connect, settings.statement_timeout),
                "timeout": min(SQLITE_BUSY_TIMEOUT_SECONDS, settings.statement_timeout),
                "factory": _RollbackOnClose,
            },
        }
        self.writer = self.bulk = self._engine(settings, "writer", pool_size=1, **options)
        self.reader = self._engine(
            settings,
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
        self._read_slots = _Slots("readers", readers, settings.pool_timeout, SQLITE_READERS_PART)
        self._write_slots = _Slots("writer", 1, settings.pool_timeout)

    @staticmethod
    def _engine(settings: Settings, name: str, **options: Any) -> AsyncEngine:
        return _measured(create_async_engine(settings.database_url, **_pool_options(name), **options), name)

    def write_slot(self) -> AbstractAsyncContextManager[None]:
        return self._write_slots.hold()

    def read_slot(self, share: str = "") -> AbstractAsyncContextManager[None]:
        return self._read_slots.hold(share)

    def bulk_slot(self) -> AbstractAsyncContextManager[None]:
        return self._write_slots.hold(timeout=BULK_POOL_TIMEOUT_SECONDS)


class _Slots:
    """Fair shares of a pool's connections, or of SQLite's writer: a caller holds a slot while it uses one."""

    def __init__(self, pool: str, size: int, timeout: float, part: int = CONNECTIONS_PART) -> None:
        self._pool = pool
        self._shares = FairSemaphore(size, part)
        self._timeout = timeout

    @asynccontextmanager
    async def hold(self, share: str = "", timeout: float | None = None) -> AsyncIterator[None]:
        """Hold a slot of a share, or the current caller's.

        Raises QuotaExceeded or PoolExhausted after `timeout` seconds.
        """
        caller = share or current_share()
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
                "connections to the database, which is its share; nothing was done, try again when some of "
                "them have ended"
            )
        return PoolExhausted("the database is busy with other calls; nothing was done, try again")


def _pool_options(name: str) -> dict[str, Any]:
    return {"poolclass": InstrumentedPool, "pool_logging_name": name, "hide_parameters": True}


def _measured(engine: AsyncEngine, name: str) -> AsyncEngine:
    measure_pool(engine, name)
    measure_statements(engine)
    return engine


def _discard_ending(failure: ExceptionContext) -> None:
    # SQLAlchemy believes asyncpg that the connection is open.
    if is_ending(failure.original_exception):
        failure.is_disconnect = True


class _RollbackOnClose(sqlite3.Connection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, *args: Any) -> Any:
        cursor = super().cursor(*args)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        # A statement that a cancelled call left half-read keeps a closed connection, its transaction and the
        # writer's lock alive. If it was interrupted, it also interrupts the rollback. So close cursors first.
        for cursor in list(self._cursors):
            cursor.close()
        try:
            self.rollback()
        finally:
            super().close()


def _prepare_writer(connection: AsyncAdapt_aiosqlite_connection, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
    connection.isolation_level = None  # otherwise the driver sends BEGIN itself, and late
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    # Overwrite what is deleted or replaced. In some builds of SQLite this is the default.
    cursor.execute("PRAGMA secure_delete = ON")
    cursor.close()


def _prepare_reader(connection: AsyncAdapt_aiosqlite_connection, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    # A deferred transaction that writes later fails at once if another process writes, whatever the timeout.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _session(engine: AsyncEngine) -> Session:
    return Session(ReadSession(async_sessionmaker(engine, expire_on_commit=False, autoflush=False)()))


async def _commit(session: AsyncSession) -> None:
    """Commit, and finish even if the caller is cancelled, so that the outcome is known."""
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
            note_unknown_outcome()
            raise OutcomeUnknown(
                f"{_doubt_about(error)}; read before you write again, or send a request_id, with which it is "
                "safe to repeat"
            ) from error
        raise


def _doubt_about(error: Exception) -> str:
    """Return why it is not known whether a commit will last."""
    if code_of(error) == NOT_REPLICATED:
        return "no standby of the database has confirmed the commit, which a failover would lose"
    return "the connection to the database broke during the commit"
