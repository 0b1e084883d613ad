"""The row of a running server."""

import asyncio

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.engine import Database
from service.heartbeat import Heartbeat
from service.settings import Settings
from tests.support.pgbouncer import direct


async def test_failed_heartbeat_is_logged_and_tried_again(
    postgresql_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for long, and the service does not notice."""
    monkeypatch.setattr("service.heartbeat.WRITE_SECONDS", 0.2)
    monkeypatch.setattr("service.heartbeat.INTERVAL_SECONDS", 0.01)
    plain = make_url(direct(postgresql_url)).set(drivername="postgresql").render_as_string()
    blocker = await asyncpg.connect(plain)
    database = Database(Settings(database_url=postgresql_url))
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE roster_servers")
            beating = asyncio.create_task(Heartbeat(database).beat_forever())
            while "the table of running servers can't be written" not in caplog.text:
                await database.ping()
        while not await blocker.fetchval("SELECT count(*) FROM roster_servers"):
            await database.ping()
        beating.cancel()
    finally:
        await blocker.close()
        await database.close()


async def test_heartbeat_survives_a_slow_commit(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is up while the commit, which can't be interrupted, is under way."""
    monkeypatch.setattr("service.heartbeat.WRITE_SECONDS", 0.05)
    monkeypatch.setattr("service.heartbeat.INTERVAL_SECONDS", 0.01)
    commits = asyncio.Semaphore(0)
    commit = AsyncSession.commit

    async def commit_slowly(session: AsyncSession) -> None:
        await asyncio.sleep(0.1)
        await commit(session)
        commits.release()

    monkeypatch.setattr(AsyncSession, "commit", commit_slowly)
    database = Database(Settings(database_url=postgresql_url))
    beating = asyncio.create_task(Heartbeat(database).beat_forever())
    async with asyncio.timeout(30):
        for _ in range(4):
            await commits.acquire()
    beating.cancel()
    await asyncio.wait([beating])
    await database.close()
