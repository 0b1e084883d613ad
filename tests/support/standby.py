"""Hot standbys for the tests, made with `pg_basebackup`, and databases that are replicated to one."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from sqlalchemy import make_url

from tests.support.postgres import PostgresServer, find_programs
from tests.support.replication import COPY, signal_server

CATCH_UP_SECONDS = 30
REPLICATION = ("initdb", "pg_basebackup", "pg_ctl", "postgres")


def replication_is_missing() -> str:
    """Return why there can be no standby on this machine, "" if there can."""
    try:
        find_programs(*REPLICATION)
    except FileNotFoundError as error:
        return str(error)
    return ""


class Standby(PostgresServer):
    """A hot standby of another server of the tests, which must be running; it starts as a copy of it."""

    def __init__(self, primary: PostgresServer) -> None:
        self.primary = primary
        super().__init__(programs=find_programs(*REPLICATION))

    async def pause_replay(self) -> None:
        """Receive changes, but apply none until `resume_replay`; returns once nothing more is applied."""
        await self.execute("SELECT pg_wal_replay_pause()")
        while await self.fetch("SELECT pg_get_wal_replay_pause_state()") != "paused":
            pass

    async def resume_replay(self) -> None:
        """Apply changes again, if this server is still a standby."""
        await self.execute("SELECT pg_wal_replay_resume() WHERE pg_is_in_recovery()")

    async def catch_up(self) -> None:
        """Wait until everything is applied that the primary has written; raises TimeoutError after 30 s."""
        end = await self.primary.fetch("SELECT pg_current_wal_insert_lsn()::text")
        async with asyncio.timeout(CATCH_UP_SECONDS):
            while not await self.fetch("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", end):
                pass

    async def promote(self) -> None:
        """Make this server a primary, with a timeline of its own."""
        await self.execute("SELECT pg_promote()")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep all processes of the server from running during the block; it still accepts connections."""
        signal_server(self.data, signal.SIGSTOP)
        try:
            yield
        finally:
            signal_server(self.data, signal.SIGCONT)

    def _initialise(self, port: int, *, fsync: bool) -> None:
        address = self.primary.url
        source = f"host={address.host} port={address.port} user=postgres"
        self.run("pg_basebackup", f"--dbname={source}", f"--pgdata={self.data}", *COPY)
        fsync_setting = "on" if fsync else "off"
        self.configure(port=port, unix_socket_directories=f"'{self.data.parent}'", fsync=fsync_setting)


@dataclass
class ReplicatedDatabase:
    """A database of a primary, and the same one on its standby."""

    standby: Standby
    url: str

    def on(self, server: PostgresServer) -> str:
        """Return the URL of this database on another server of the cluster."""
        name = make_url(self.url).database
        return server.url.set(database=name).render_as_string(hide_password=False)

    @property
    def replica_url(self) -> str:
        return self.on(self.standby)


@asynccontextmanager
async def replicated_database(standby: Standby, template: str) -> AsyncIterator[ReplicatedDatabase]:
    """Create a database, replicated already, as a copy of a template; drop it at the end of the block."""
    async with standby.primary.database(template) as url:
        await standby.catch_up()
        try:
            yield ReplicatedDatabase(standby, url)
        finally:
            await standby.resume_replay()
