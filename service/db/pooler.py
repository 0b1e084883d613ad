"""Recognise a pooler between Roster and PostgreSQL, such as PgBouncer, and its mode."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from sqlalchemy import NullPool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.db import conninfo
from service.db.connect import postgresql_engine
from service.settings import Settings
from service.variables import environment

Mode = Literal["none", "session", "transaction"]

NEEDS_SETTING = (
    "the database is behind a pooler in transaction mode, which keeps no session: set "
    "ROSTER_DATABASE_POOLER=transaction, or let Roster connect to PostgreSQL or to a pool in session mode"
)
REPLICA_NEEDS_SESSION = (
    "is behind a pooler in transaction mode, where the check of a replica and the read after it can be in "
    "different sessions; name PostgreSQL itself, or a pool in session mode, in ROSTER_REPLICA_URL"
)
REPLICAS_SECONDS = 1.0
SESSION = "SELECT pg_backend_pid()"


async def pooler_mode(url: str | Mapping[str, str], timeout: float) -> Mode:
    """Return the mode of the pooler that a URL, or its parameters, lead to, or none if they lead to none.

    A pooler gives each client a process id of its own for cancel requests. In session mode a client keeps its
    session of PostgreSQL. In transaction mode two clients use one in turn, or one client uses several.

    It makes two connections, sets nothing and prepares no statement, so that nothing is left in a session
    that others use. `timeout` is in seconds, for a connection and for a query. Raises the errors of
    SQLAlchemy.
    """
    async with _connect(url, timeout) as first:
        driver: Any = (await first.get_raw_connection()).driver_connection
        if await _session(first) == driver.get_server_pid():
            return "none"
        try:
            async with _connect(url, timeout) as second:
                return "transaction" if await _share_sessions(first, second) else "session"
        except TimeoutError:  # as with a pool of one session, which the first client keeps
            return "session"


async def pooler_problem(settings: Settings) -> str:
    """Return why Roster can't use the pooler between it and PostgreSQL, and what to do; "" if it can."""
    if settings.pools_transactions:
        return ""
    mode = await pooler_mode(settings.database_url, settings.connect_timeout)
    return NEEDS_SETTING if mode == "transaction" else ""


async def replica_problem(settings: Settings) -> str:
    """Return which replica is behind a pooler in transaction mode, and what to do; "" if none is known to be.

    It takes a second at most, and never fails.
    """
    if settings.replica_url is None:
        return ""
    hosts = dict(conninfo.each_host(conninfo.read(settings.replica_url, environment())))
    modes = await asyncio.gather(*(_mode_in_time(parameters) for parameters in hosts.values()))
    pooled = [name for name, mode in zip(hosts, modes, strict=True) if mode == "transaction"]
    return f"the replica {pooled[0]} {REPLICA_NEEDS_SESSION}" if pooled else ""


async def _mode_in_time(parameters: Mapping[str, str]) -> Mode | None:
    # A replica must not prevent or delay a start, so a host that is down is not known, and nobody asks again.
    # That is a small risk: the mistake is one of configuration, which does not come and go with the host. It
    # is found at the next start, or by `roster doctor`.
    with suppress(DBAPIError, OSError):  # a TimeoutError is an OSError
        async with asyncio.timeout(REPLICAS_SECONDS):
            return await pooler_mode(parameters, REPLICAS_SECONDS)
    return None


@asynccontextmanager
async def _connect(url: str | Mapping[str, str], timeout: float) -> AsyncIterator[AsyncConnection]:
    engine = postgresql_engine(
        url,
        timeout=timeout,
        pools_transactions=True,
        connect_args={"command_timeout": timeout},
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
    )
    async with engine.connect() as connection:
        yield connection


async def _share_sessions(first: AsyncConnection, second: AsyncConnection) -> bool:
    # A pooler that takes its sessions in turn would give two clients that take turns the same ones.
    turns = (first, second, second, first)
    sessions: dict[AsyncConnection, set[int]] = {first: set(), second: set()}
    for client in turns:
        sessions[client].add(await _session(client))
    is_changing = any(len(found) > 1 for found in sessions.values())
    return is_changing or sessions[first] == sessions[second]


async def _session(client: AsyncConnection) -> int:
    return int((await client.exec_driver_sql(SESSION)).scalar_one())
