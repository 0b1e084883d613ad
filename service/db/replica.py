"""Replicas: the reads that a standby may answer, and those that the primary must.

    a read that names a position in the log
      │ is the position of this cluster, and on the primary's timeline? ──── no → primary
      │ is the replica left out, since it failed? ────────────────────────  yes → primary
      │ is there a connection, within half a second? ─────────────────────── no → primary, and leave it out
      │ is its server on that timeline, and has it replayed the position?    no → wait 20 ms, then primary
      ▼
    the read, on the same connection ───────────────────────────────── it fails → primary

Whatever goes wrong on a replica, the primary decides what the caller gets. So a read on a replica has half of
the time that is left until its deadline. The check is a statement of its own: in one statement with the read,
the snapshot would be older than the check.

**Which timeline a standby is on.** After a promotion, a standby may have replayed a part of the old timeline
that the new primary does not have. Its LSN can then be above that of a write on the new timeline that it has
never seen, so the timeline has to be compared first. PostgreSQL does not report the timeline that a standby
replays (`pg_walfile_name` raises there). It reports three others: that of the last restart point
(`pg_control_checkpoint`), that of the last page written (`pg_control_recovery`), and, to a role with
`pg_read_all_stats`, that of the log being received. None of them is reported before the standby has accepted
that timeline: it refuses one that branched off before its own position. So the largest of the three is never
too new. It may be old for minutes after a promotion, at most until the next restart point
(`checkpoint_timeout`); in that time, reads with tokens go to the primary. A standby that has since moved to a
still newer timeline does not matter: the token is then not on the timeline of the primary, or is lost.

A server that is not in recovery has a timeline and a position as well. If it is the primary, both are those
of the tokens, so it counts as caught up. A standby that was promoted while the primary goes on has another
timeline, and answers no read with a token.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from typing import Any, NamedTuple

from sqlalchemy import PoolProxiedConnection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from roster.errors import (
    DatabaseUnavailable,
    PoolExhausted,
    QuotaExceeded,
    RosterError,
    StatementTimeout,
)
from service.auth.caller import SYSTEM
from service.consistency import ANYWHERE, Position, Requirement
from service.db.compiled import CompiledSelect
from service.db.driver import DriverConnections
from service.db.errors import cause_of, code_of, translate_errors
from service.db.position import CLUSTER, PRIMARY_LSN, PRIMARY_TIMELINE, Lag, PrimaryPosition, select_sql
from service.metrics import (
    READS_ON_REPLICA,
    REPLICA_FALLBACKS,
    REPLICA_LAG,
    REPLICA_LAG_BYTES,
    REPLICA_WAITS,
)

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.02
POLL_SECONDS = 0.002
# For a connection, and for the check on it. A server that takes longer is left out.
ANSWER_SECONDS = 0.5
PROBE_SECONDS = 1
PRIMARY_SECONDS = 0.25  # to say whether a position exists, before a read waits for it
CANCEL_SECONDS = 0.5  # for a server to confirm that it has cancelled a read; then its connection is ended
CONFLICT = "40"  # class of the SQLSTATE of "canceling statement due to conflict with recovery"

IS_REPLICA = "pg_is_in_recovery()"
REPLICA_TIMELINE = """greatest(
    (SELECT timeline_id FROM pg_control_checkpoint()),
    (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
    (SELECT received_tli FROM pg_stat_wal_receiver)
)"""

REPLAYED_LSN = f"CASE WHEN {IS_REPLICA} THEN pg_last_wal_replay_lsn() ELSE {PRIMARY_LSN} END"

REPLAYED = select_sql(is_replica=IS_REPLICA, lsn=REPLAYED_LSN)
IDENTITY_COLUMNS = {
    "is_replica": IS_REPLICA,
    "cluster": CLUSTER,
    "timeline": f"CASE WHEN {IS_REPLICA} THEN {REPLICA_TIMELINE} ELSE {PRIMARY_TIMELINE} END",
    "name": "concat(inet_server_addr(), ':', current_setting('port'))",
}
IDENTITY = select_sql(**IDENTITY_COLUMNS)
PROBE = select_sql(**IDENTITY_COLUMNS, lsn=REPLAYED_LSN)
FOREIGN = "it is not a replica of the database in ROSTER_DATABASE_URL"
PROMOTED = "it was promoted, and no longer follows the primary"
_IDENTITY = "identity of the server"  # in the `info` of a connection


class Identity(NamedTuple):
    """The server of a connection. It keeps its cluster; its timeline can only become newer."""

    is_replica: bool
    cluster: int
    timeline: int
    name: str  # address and port, without meaning otherwise


class UsePrimary(Exception):
    """The primary has to answer this read; `reason` is a label of REPLICA_FALLBACKS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Guard:
    """Ends a connection after a time, so that nothing waits longer for a server that does not answer.

    A cancellation would not do: before the connection goes back to the pool, the driver waits until the
    server confirms it. It is for callers with little time left, whose connections should be kept.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def arm(self, connection: PoolProxiedConnection, seconds: float) -> None:
        """End a connection after this time."""
        self.disarm()
        driver: Any = connection.driver_connection
        self._timer = asyncio.get_running_loop().call_later(seconds, driver.abort)

    def disarm(self) -> None:
        """Let the connection live."""
        if self._timer:
            self._timer.cancel()


class Replica:
    """The replicas that one URL names. Each connection is with one of them.

    A replica that fails is left out until a probe finds that it answers again. So an outage costs the reads
    in flight half a second, and the others nothing.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        size: int,
        hold_slot: Callable[[str], AbstractAsyncContextManager[None]],
        primary: PrimaryPosition,
    ) -> None:
        self.primary = primary
        self._engine = engine
        self._connections = DriverConnections(engine, size)
        self._hold_slot = hold_slot
        self._read_identity = CompiledSelect(IDENTITY, engine.dialect)
        self._read_replayed = CompiledSelect(REPLAYED, engine.dialect)
        self._is_up: bool | None = None  # not known before the first probe
        self._newest: Position | None = None  # that was seen on a replica
        # By server: the LSN that it had not replayed at the end of a wait. Until it has, no read waits.
        self._awaited: dict[str, int] = {}
        self._lag = Lag()

    def has_replayed(self, position: Position) -> bool:
        """Return whether this position was seen on a replica: a read of it will hardly have to wait."""
        newest = self._newest
        if position == ANYWHERE or newest is None:
            return position == ANYWHERE
        is_comparable = (position.cluster, position.timeline) == (newest.cluster, newest.timeline)
        return is_comparable and position <= newest

    @asynccontextmanager
    async def connection(self, requirement: Requirement, share: str) -> AsyncIterator[PoolProxiedConnection]:
        """Hold a connection to a replica that meets a requirement.

        Raises UsePrimary if there is none, or if the read on the connection fails.
        """
        async with self._attempt(requirement) as (stack, guard):
            async with self._opening(stack, share):
                connection = await stack.enter_async_context(self._connections.open())
            await self._admit(connection, guard, requirement)
            yield connection

    @asynccontextmanager
    async def session(self, requirement: Requirement) -> AsyncIterator[AsyncSession]:
        """Open a session on a replica that meets a requirement; raises UsePrimary as `connection` does."""
        async with self._attempt(requirement) as (stack, guard):
            session, connection = await self._open_session(stack, "")
            await self._admit(connection, guard, requirement)
            yield session

    async def reaches(self, requirement: Requirement) -> bool:
        """Return whether a replica has replayed the position, or does within 20 ms. It counts as no read."""
        if self.has_replayed(requirement.position):
            return True
        try:
            async with self._attempt(requirement, is_read=False) as (stack, guard):
                async with self._opening(stack, ""):
                    connection = await stack.enter_async_context(self._connections.open())
                await self._admit(connection, guard, requirement)
        except UsePrimary:
            return False
        return True

    async def watch_forever(self) -> None:
        """Probe a replica every second."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self.probe()

    async def probe(self) -> None:
        """Find out whether a replica answers, and measure how far it is behind."""
        primary = await self.primary.current(PRIMARY_SECONDS)
        try:
            replayed = await self._probe()
        except UsePrimary as busy:  # all connections are in use, so they work
            log.info("the replica was not probed: %s", busy)
            return
        now = asyncio.get_running_loop().time()
        if primary:
            self._lag.note(primary, now)
        seconds, size = self._lag.measure(replayed, now)
        REPLICA_LAG.set(seconds)
        REPLICA_LAG_BYTES.set(size)

    async def close(self) -> None:
        """Close all connections."""
        await self.primary.close()
        await self._connections.close()
        await self._engine.dispose()

    @asynccontextmanager
    async def _attempt(
        self, requirement: Requirement, *, is_read: bool = True
    ) -> AsyncIterator[tuple[AsyncExitStack, Guard]]:
        """Count how an attempt to read on a replica ends, and raise UsePrimary if the primary has to."""
        try:
            self._screen(requirement.position)
            with translate_errors(" on a replica"):
                async with AsyncExitStack() as stack:
                    guard = Guard()
                    # Entered first, so disarmed last: until then the connection may wait for its server.
                    stack.callback(guard.disarm)
                    async with half_of_time(requirement):
                        yield stack, guard
        except UsePrimary as refusal:
            reason = refusal.reason
        except Exception as error:
            reason = self._reason(error)
            if not reason:
                READS_ON_REPLICA.inc(is_read)
                raise
        else:
            READS_ON_REPLICA.inc(is_read)
            return
        REPLICA_FALLBACKS.labels(reason).inc(is_read)
        raise UsePrimary(reason)

    def _reason(self, error: Exception) -> str:
        """Return why the primary has to answer after an error, "" if it would answer the same."""
        if isinstance(error, PoolExhausted):
            return "busy"
        if isinstance(error, StatementTimeout):
            return "slow"
        if isinstance(error, DatabaseUnavailable):
            if code_of(error).startswith(CONFLICT):
                return "conflict"
            self._leave_out(cause_of(error))
            return "failed"
        if isinstance(error, RosterError):  # an answer, such as NotFound
            return ""
        # Such as a column that a migration has not brought to the replica yet.
        self._leave_out(cause_of(error))
        return "failed"

    def _screen(self, position: Position) -> None:
        """Raise UsePrimary if no replica can have a position, or if none answers."""
        primary = self.primary.last
        if not (self._is_up and primary):
            raise UsePrimary("down")
        if position == ANYWHERE:
            return
        if position.cluster != primary.cluster:
            raise UsePrimary("cluster")
        if position.timeline != primary.timeline:
            raise UsePrimary("timeline")

    @asynccontextmanager
    async def _opening(self, stack: AsyncExitStack, share: str) -> AsyncIterator[None]:
        """Hold a slot in the stack, and bound the time for the body to open a connection."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await stack.enter_async_context(self._hold_slot(share))
        except (TimeoutError, PoolExhausted, QuotaExceeded):
            raise UsePrimary("busy") from None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                yield
        except TimeoutError:
            raise ConnectionError("the replica does not answer") from None

    async def _open_session(self, stack: AsyncExitStack, share: str) -> tuple[AsyncSession, Any]:
        """Open a session in the stack, and return it with its connection."""
        async with self._opening(stack, share):
            await self._connections.make_room()
            session = await stack.enter_async_context(AsyncSession(self._engine, autoflush=False))
            return session, await (await session.connection()).get_raw_connection()

    async def _admit(self, connection: PoolProxiedConnection, guard: Guard, requirement: Requirement) -> None:
        """Check a connection before a read; raises UsePrimary."""
        guard.arm(connection, ANSWER_SECONDS)
        await self._check(connection, requirement.position)
        guard.disarm()
        if requirement.deadline is not None:
            left = requirement.deadline - asyncio.get_running_loop().time()
            guard.arm(connection, left / 2 + CANCEL_SECONDS)

    async def _check(self, connection: PoolProxiedConnection, position: Position) -> None:
        """Raise UsePrimary unless the server of a connection has replayed a position."""
        server = await self._identify(connection, position.timeline)
        if problem := self._problem_of(server):
            self._leave_out(problem)
            raise UsePrimary("cluster" if problem == FOREIGN else "timeline")
        if position == ANYWHERE or await self._replayed(connection, position.timeline) >= position.lsn:
            return
        if server.name in self._awaited:
            raise UsePrimary("behind")
        # A position above the primary's is never reached. If reads waited for it, others would have to go
        # without a wait.
        primary = await self.primary.current(PRIMARY_SECONDS)
        if primary is None or position > primary:
            raise UsePrimary("above")
        is_reached = await self._wait(connection, position)
        REPLICA_WAITS.labels("caught up" if is_reached else "behind").inc()
        if not is_reached:
            self._awaited[server.name] = position.lsn
            raise UsePrimary("behind")

    async def _wait(self, connection: PoolProxiedConnection, position: Position) -> bool:
        """Wait until the server of a connection has replayed a position; return whether it has."""
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)
            if await self._replayed(connection, position.timeline) >= position.lsn:
                return True
        return False

    async def _identify(self, connection: PoolProxiedConnection, timeline: int = 0) -> Identity:
        """Return the server of a connection; asks it again if it was on an older timeline than this one."""
        identity: Identity | None = connection.info.get(_IDENTITY)
        if identity is None or identity.timeline < timeline:
            [row] = await self._read_identity.rows(connection)
            identity = connection.info[_IDENTITY] = Identity(*row)
        return identity

    async def _replayed(self, connection: PoolProxiedConnection, timeline: int) -> int:
        """Return the LSN up to which a server has replayed; raises UsePrimary on another timeline."""
        [(is_replica, lsn)] = await self._read_replayed.rows(connection)
        server = await self._identify(connection)
        if server.is_replica != is_replica:  # it was promoted
            del connection.info[_IDENTITY]
            server = await self._identify(connection)
        if server.timeline != timeline:
            raise UsePrimary("timeline")
        self._note(server, lsn)
        return int(lsn)

    def _note(self, server: Identity, lsn: int) -> None:
        """Remember how far a server has replayed."""
        position = Position(server.cluster, server.timeline, lsn)
        if not self.has_replayed(position):
            self._newest = position
        if lsn >= self._awaited.get(server.name, lsn):
            self._awaited.pop(server.name, None)

    async def _probe(self) -> int | None:
        """Return how far a replica has replayed, None if it can't be used; raises UsePrimary if busy."""
        try:
            async with AsyncExitStack() as stack:
                guard = Guard()
                stack.callback(guard.disarm)
                session, connection = await self._open_session(stack, SYSTEM)
                guard.arm(connection, ANSWER_SECONDS)
                # Through SQLAlchemy: if this connection is broken, it replaces all others of the pool too.
                found: Sequence[Any] = (await session.execute(PROBE)).one()
        except UsePrimary:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, reads have the primary
            self._leave_out(cause_of(error))
            return None
        server, lsn = Identity(*found[:-1]), int(found[-1])
        if problem := self._problem_of(server):
            self._leave_out(problem)
            return None
        self._note(server, lsn)
        if not self._is_up:
            self._is_up = True
            log.info("the replica is in use: %s", server.name)
        return lsn

    def _problem_of(self, server: Identity) -> str:
        """Return why a server can answer no read at all, "" if it can."""
        primary = self.primary.last
        if primary is None or server.cluster != primary.cluster:
            return FOREIGN
        # A standby is on an older timeline for a while after a failover.
        return PROMOTED if not server.is_replica and server.timeline != primary.timeline else ""

    def _leave_out(self, cause: str) -> None:
        if self._is_up is not False:
            self._is_up = False
            log.warning("the replica is left out: %s", cause)


@asynccontextmanager
async def half_of_time(requirement: Requirement) -> AsyncIterator[None]:
    """Cancel the body when half of the time until the deadline is over, with an error that says why."""
    now = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(requirement.deadline and (requirement.deadline - now) / 2):
            yield
    except TimeoutError:
        raise TimeoutError("the replica took half of the time of the call") from None
