"""A Roster server inside the test's process."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from service.server import Server, utc_now
from service.settings import Settings

FREE_PORT = "127.0.0.1:0"


@asynccontextmanager
async def serve(
    database_url: str, *, clock: Callable[[], datetime] = utc_now, **settings: Any
) -> AsyncIterator[Server]:
    """Serve the database on a free port until the block ends, without a grace period.

    The settings are those of `Settings`. Raises OSError if an address is not available.
    """
    server = Server(Settings(database_url=database_url, **{"listen": FREE_PORT, **settings}), clock)
    try:
        await server.start()
    except OSError:
        await server.database.close()
        raise
    try:
        await probe_again(server)
        yield server
    finally:
        await server.stop(grace=0)


async def probe_again(server: Server) -> None:
    """Probe a replica that was left out at the start: a busy machine may have taken too long to connect."""
    for _ in range(2):
        if server.replica and not server.replica._is_up:
            await server.replica.probe()
