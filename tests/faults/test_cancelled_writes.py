"""Callers who go away at any moment, and what they leave behind."""

import asyncio
from contextlib import suppress

from sqlalchemy import insert

from service.db.engine import Database
from service.users.model import User

ROUNDS = 3


async def write(database: Database, name: str) -> None:
    rows = [{"email": f"{name}{number}@example.org"} for number in range(50)]
    async with database.begin() as session:
        await session.scalars(insert(User).returning(User.id), rows)


async def test_cancelled_write_leaves_no_lock(database: Database) -> None:
    """Cancelled at any moment of its write, a call holds up none of those that come next."""
    for number in range(ROUNDS):
        turns = 1
        while not (is_done := await cancelled(database, f"{number}-{turns}-gone-", turns)):
            await write(database, f"{number}-{turns}-")
            turns += 1 + turns // 8
        assert is_done


async def cancelled(database: Database, name: str, turns: int) -> bool:
    """Cancel a write after so many turns of the loop, and tell whether it had come to its end."""
    task = asyncio.create_task(write(database, name))
    for _ in range(turns):
        await asyncio.sleep(0)
    is_done = task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return is_done
