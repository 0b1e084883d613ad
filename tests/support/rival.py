"""Another session on the same PostgreSQL, which blocks the service."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.distribution import IS_CITUS
from tests.support.pgbouncer import direct

T = TypeVar("T")

DEADLINE_SECONDS = 20
WAITING = """
SELECT pid FROM pg_locks
WHERE NOT granted AND pid <> $1 AND pg_blocking_pids(pid) && ARRAY[$1, pg_backend_pid()]
"""
# On Citus, the lock can be on a worker. A global pid has the node's number in front of ten digits.
WAITING_ON_CITUS = f"""
SELECT pid FROM ({WAITING}) AS here
UNION ALL
SELECT (waiting_gpid % 10000000000)::int FROM citus_lock_waits
WHERE waiting_gpid % 10000000000 <> $1 AND blocking_gpid % 10000000000 IN ($1, pg_backend_pid())
"""

# Once a rival has executed this, the commits of `delay_commits` wait until its transaction ends.
LOCK_COMMITS = "SELECT pg_advisory_xact_lock(1)"
DELAYED_COMMIT = f"""
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
'BEGIN PERFORM {LOCK_COMMITS.removeprefix("SELECT ")}; RETURN NULL; END';
CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON {{table}}
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait();
"""
# Citus allows no triggers on a table of its own, but on the coordinator's copy of the rows.
COPY_OF_USERS = "SELECT 'users_' || shardid FROM pg_dist_shard WHERE logicalrelid = 'users'::regclass"


class Rival:
    """A session with an open transaction, for whose locks others wait."""

    def __init__(self, connection: "asyncpg.Connection[Any]") -> None:
        self.connection = connection
        self.transaction = connection.transaction()

    async def execute(self, statement: str) -> None:
        """Execute a statement in the transaction."""
        await self.connection.execute(statement)

    async def count(self, statement: str) -> int:
        """Return the answer to a statement about the sessions of the server as they are now."""
        # A transaction sees pg_stat_activity as it was when it first read it.
        await self.execute("SELECT pg_stat_clear_snapshot()")
        return int(await self.connection.fetchval(statement))

    async def wait_for_blocked(self, other: int = 0) -> int:
        """Wait until a session waits for this one, directly or through another, and return its process id."""
        pid = await until(lambda: find_blocked(self.connection, other))
        assert pid
        return pid

    async def commit(self) -> None:
        """Commit the transaction."""
        await self.transaction.commit()

    async def rollback(self) -> None:
        """Roll the transaction back."""
        await self.transaction.rollback()


@asynccontextmanager
async def rival(url: str) -> AsyncIterator[Rival]:
    """Open another session, and begin a transaction."""
    plain = make_url(direct(url)).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(plain)
    try:
        other = Rival(connection)
        await other.transaction.start()
        yield other
    finally:
        await connection.close()


async def find_blocked(connection: "asyncpg.Connection[Any]", other: int = 0) -> int | None:
    """Return the process id of a session that waits for this one, or for another; None if none does."""
    is_citus = await connection.fetchval(IS_CITUS)
    pid: int | None = await connection.fetchval(WAITING_ON_CITUS if is_citus else WAITING, other)
    return pid


async def find_blocked_by(session: AsyncSession) -> int | None:
    """Return the process id of a session that waits for the transaction of the service's own."""
    raw: Any = await (await session.connection()).get_raw_connection()
    return await find_blocked(raw.driver_connection)


async def delay_commits(url: str) -> None:
    """Let each commit of a new user take the lock of LOCK_COMMITS."""
    async with rival(url) as session:
        is_citus = await session.connection.fetchval(IS_CITUS)
        table = await session.connection.fetchval(COPY_OF_USERS) if is_citus else "users"
        await session.execute(DELAYED_COMMIT.format(table=table))
        await session.commit()


async def until(condition: Callable[[], Awaitable[T]]) -> T:
    """Check a condition until it is true, and return its value; raises TimeoutError after 20 s."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (answer := await condition()):  # noqa: ASYNC110  (another process changes it)
            await asyncio.sleep(0.01)
    return answer
