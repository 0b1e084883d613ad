"""The row of a running server."""

import asyncio

import asyncpg
import pytest
from sqlalchemy import make_url

from service.db.engine import Database
from service.heartbeat import Heartbeat
from service.settings import Settings


async def test_failed_heartbeat_is_logged_and_tried_again(
    postgresql_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for long, and the service does not notice."""
    monkeypatch.setattr("service.heartbeat.WRITE_SECONDS", 0.2)
    monkeypatch.setattr("service.heartbeat.INTERVAL_SECONDS", 0.01)
    plain = make_url(postgresql_url).set(drivername="postgresql").render_as_string()
    blocker = await asyncpg.connect(plain)
    database = Database(Settings(database_url=postgresql_url))
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE servers")
            beating = asyncio.create_task(Heartbeat(database).beat_forever())
            while "the table of running servers can't be written" not in caplog.text:
                await database.ping()
        while not await blocker.fetchval("SELECT count(*) FROM servers"):
            await database.ping()
        beating.cancel()
    finally:
        await blocker.close()
        await database.close()
