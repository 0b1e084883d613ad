"""Writes whose callers are cancelled at any moment."""

import asyncio
from collections import Counter
from contextlib import suppress

from sqlalchemy import insert, select

from service.db.engine import Database
from service.users.model import User

ROUNDS = 3
ROWS = 50


async def write(database: Database, name: str) -> None:
    rows = [{"email": f"{name}.{number}@example.org"} for number in range(ROWS)]
    async with database.begin() as session:
        await session.scalars(insert(User).returning(User.id), rows)


async def test_cancelled_write_leaves_no_lock_and_no_part_of_itself(database: Database) -> None:
    """The next write succeeds wherever the one before was cancelled; that one is whole or absent."""
    written: set[str] = set()
    cancelled: set[str] = set()
    for number in range(ROUNDS):
        iterations = 1
        while not await cancel(database, f"cancelled-{number}-{iterations}", iterations):
            cancelled.add(f"cancelled-{number}-{iterations}")
            await write(database, f"written-{number}-{iterations}")
            written.add(f"written-{number}-{iterations}")
            iterations += 1 + iterations // 8
        written.add(f"cancelled-{number}-{iterations}")

    stored = await rows_by_name(database)
    assert set(stored.values()) == {ROWS}
    assert written <= set(stored) <= written | cancelled
    assert cancelled - set(stored), "no write was cancelled before its commit"


async def cancel(database: Database, name: str, iterations: int) -> bool:
    """Cancel a write after this many iterations of the event loop; return whether it had ended before."""
    task = asyncio.create_task(write(database, name))
    for _ in range(iterations):
        await asyncio.sleep(0)
    is_done = task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return is_done


async def rows_by_name(database: Database) -> Counter[str]:
    """Return how many rows of each write are stored."""
    async with database.read() as session:
        emails = await session.scalars(select(User.email))
        return Counter(email.partition(".")[0] for email in emails)
