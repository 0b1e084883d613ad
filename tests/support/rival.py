"""Another session on the same PostgreSQL, which gets in the way."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import make_url

T = TypeVar("T")

DEADLINE_SECONDS = 20
WAITING = """
SELECT pid FROM pg_locks
WHERE NOT granted AND pid <> $1 AND pg_blocking_pids(pid) && ARRAY[$1, pg_backend_pid()]
"""


# While a rival has executed this, the commits delayed by `delay_commits` wait for it.
LOCK_COMMITS = "SELECT pg_advisory_xact_lock(1)"
DELAYED_COMMIT = f"""
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
'BEGIN PERFORM {LOCK_COMMITS.removeprefix("SELECT ")}; RETURN NULL; END';
CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON users
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait();
"""


class Rival:
    """A session in a transaction of its own; what it locks others wait for."""

    def __init__(self, connection: "asyncpg.Connection[Any]") -> None:
        self.connection = connection
        self.transaction = connection.transaction()

    async def execute(self, statement: str) -> None:
        """Execute a statement in the transaction."""
        await self.connection.execute(statement)

    async def waiting(self, other: int = 0) -> int:
        """Wait until a session waits for this one, or for another that does, and return its process id."""
        return int(await until(lambda: self.connection.fetchval(WAITING, other)))

    async def commit(self) -> None:
        """Let the others see what this one wrote."""
        await self.transaction.commit()

    async def rollback(self) -> None:
        """Undo it."""
        await self.transaction.rollback()


@asynccontextmanager
async def rival(url: str) -> AsyncIterator[Rival]:
    """Open a session beside the service's."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(plain)
    try:
        other = Rival(connection)
        await other.transaction.start()
        yield other
    finally:
        await connection.close()


async def delay_commits(url: str) -> None:
    """Let each commit of a new user take the lock of LOCK_COMMITS."""
    async with rival(url) as session:
        await session.execute(DELAYED_COMMIT)
        await session.commit()


async def until(condition: Callable[[], Awaitable[T]]) -> T:
    """Ask again and again until the answer is true, and return it; raises TimeoutError in the end."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (answer := await condition()):  # noqa: ASYNC110  (another process changes it)
            await asyncio.sleep(0.01)
    return answer
