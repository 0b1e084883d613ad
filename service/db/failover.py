"""Closes the connections to a server that another one has replaced.

A server that dies takes its connections with it. One that is stopped, or whose network is down, keeps them:
statements wait for their timeout, and so does everybody who waits for a connection. So every new connection
is asked for its server, and closes those to a server that this one replaces. If there is no new connection
because all are stuck, a doubt opens one:

    health check fails ──┐
                         ├──> doubt ──┐
    "read-only" (25006) ─┘            ├──> connect ──> a server that replaces the old one: close
    another connection is needed ─────┘       └──────> the same server: a statement is slow, or all are

A slow database is therefore left alone, however long it takes. And as long as there are connections to the
new server, none is opened to the old one, even if it comes back and accepts writes.
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

import asyncpg
from sqlalchemy import AdaptedConnection, ExceptionContext, NullPool, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine

from service.db.connect import WrongHost, postgresql_engine
from service.db.errors import code_of
from service.db.position import CLUSTER, PRIMARY_TIMELINE

log = logging.getLogger(__name__)

# How long a doubt lasts without an answer of any server; a health check that fails again renews it.
DOUBT_SECONDS = 5
PAUSE_SECONDS = 0.5
CONNECT_SECONDS = 2.5
IDENTIFY_SECONDS = 5
READ_ONLY = "25006"

IDENTIFY = f"""
    SELECT {CLUSTER} AS system, pg_postmaster_start_time() AS started, clock_timestamp() AS asked,
        CASE WHEN NOT pg_is_in_recovery() THEN {PRIMARY_TIMELINE} END AS timeline
"""
# A role may not be allowed to call those functions, and not every compatible database has them.
IDENTIFY_BY_TIME = """
    SELECT NULL AS system, pg_postmaster_start_time() AS started, clock_timestamp() AS asked, NULL AS timeline
"""
# No right, or no such function. Any other error, such as that of a server that is shutting down, says nothing
# about the next connection.
UNABLE = (asyncpg.SyntaxOrAccessError, asyncpg.FeatureNotSupportedError)


@dataclass(frozen=True)
class ServerIdentity:
    """The server that a connection leads to, when the connection was opened.

    `timeline` is 0 for a standby, which replaces no server; `system` is None if the server does not say.
    `asked` is the server's time.
    """

    system: int | None
    timeline: int
    started: datetime
    asked: datetime

    def replaces(self, old: "ServerIdentity") -> bool:
        """Return whether this server has taken the place of the old one.

        A promotion begins a new timeline. A service that starts another server with the same storage does
        not, but only one of them can write. A server that does not say of which system it is has replaced one
        to which a connection was opened before it started; that is likely, but not certain.
        """
        if not (self.is_known and old.is_known):
            return self.started > old.asked
        is_primary_of_same_system = self.timeline > 0 and self.system == old.system
        return is_primary_of_same_system and (self.timeline, self.started) > (old.timeline, old.started)

    @property
    def is_known(self) -> bool:
        """Whether the server has said of which system and timeline it is."""
        return self.system is not None


class Failover:
    """Watches the connections of engines to the database of a URL, which `admit` each new connection."""

    def __init__(self, url: str) -> None:
        self._engine = postgresql_engine(url, poolclass=NullPool, admit=self.admit)
        self._servers: WeakKeyDictionary[Any, ServerIdentity] = WeakKeyDictionary()
        self._doubt = asyncio.Event()
        self._query = IDENTIFY

    def watch(self, engine: AsyncEngine) -> None:
        """Watch the connections of an engine, from its first one on."""
        # Before the listeners that count connections.
        event.listen(engine.sync_engine, "checkout", _replace_closed, insert=True)
        event.listen(engine.sync_engine, "handle_error", self._doubt_writes)

    def doubt(self) -> None:
        """Find out soon whether the open connections still lead to the right server."""
        self._doubt.set()

    async def watch_forever(self) -> None:
        """Close the connections to servers that have been replaced."""
        while True:
            await self._doubt.wait()
            try:
                async with asyncio.timeout(DOUBT_SECONDS):
                    while not await self._close_replaced():  # noqa: ASYNC110  (nobody reports a promotion)
                        await asyncio.sleep(PAUSE_SECONDS)
            except TimeoutError:
                log.debug("no server of the database answers")
            except Exception:
                log.exception("the server of the database can't be determined")
            self._doubt.clear()

    async def admit(self, driver: Any) -> None:
        """Remember the server of a new connection, and close those to servers that it replaces.

        Raises WrongHost if an open connection leads to a server that has replaced it.
        """
        try:
            async with asyncio.timeout(IDENTIFY_SECONDS):
                server = await self._identify(driver)
            if server and server.is_known:
                self._require_newest(server)
                self._close_older(server)
        except BaseException as error:
            driver.terminate()  # nobody else has it yet
            if isinstance(error, asyncpg.InterfaceError):
                raise ConnectionError(str(error)) from error
            raise
        if server:
            self._servers[driver] = server

    async def _close_replaced(self) -> bool:
        """Close the connections to servers that the present one replaces; return whether there is one."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS), self._engine.connect() as connection:
                raw = await connection.get_raw_connection()
                server = self._servers.get(raw.driver_connection)
        except (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        if server:  # `admit` does not believe one that does not say of which system it is
            self._close_older(server)
        return True

    def _require_newest(self, server: ServerIdentity) -> None:
        """Raise WrongHost if an open connection leads to a server that has replaced this one."""
        for connection, other in self._servers.items():
            if other.is_known and other.replaces(server) and not connection.is_closed():
                raise WrongHost("another server has replaced this one")

    def _close_older(self, server: ServerIdentity) -> None:
        replaced = [each for each, old in self._servers.items() if server.replaces(old)]
        open_ones = [connection for connection in replaced if not connection.is_closed()]
        for connection in open_ones:
            connection.abort()
        if open_ones:
            log.warning(
                "another server has replaced the database's primary: closed %s connections to the old one",
                len(open_ones),
            )

    async def _identify(self, driver: Any) -> ServerIdentity | None:
        """Return the server that a connection leads to, None if it does not say."""
        try:
            row = await driver.fetchrow(self._query)
        except asyncpg.PostgresError as error:
            if driver.is_closed():
                raise
            if self._query == IDENTIFY_BY_TIME or not isinstance(error, UNABLE):
                return None
            self._query = IDENTIFY_BY_TIME
            return await self._identify(driver)
        return ServerIdentity(row["system"], row["timeline"] or 0, row["started"], row["asked"])

    def _doubt_writes(self, failure: ExceptionContext) -> None:
        if code_of(failure.original_exception) == READ_ONLY:
            self.doubt()


def _replace_closed(connection: AdaptedConnection, *_: object) -> None:
    """Let the pool open another connection in place of one that is closed already."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError("the connection is closed")
