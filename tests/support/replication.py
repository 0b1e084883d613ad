"""A primary and its standbys by streaming replication, which can be killed, stalled, promoted and rebuilt."""

import asyncio
import os
import shutil
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select
from typing import Self

from tests.support.postgres import PostgresServer

COPY = ("--checkpoint=fast", "--no-sync", "--wal-method=stream", "--write-recovery-conf")
SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"


class Node(PostgresServer):
    """A server that can be the primary, or a standby of another one, which knows it by its `name`."""

    def __init__(self, name: str, primary: "Node | None" = None) -> None:
        self.name = name
        self._primary = primary
        super().__init__()

    def __exit__(self, *_: object) -> None:
        self.resume()  # a stopped process can't be shut down
        super().__exit__()

    def follow(self, primary: "Node") -> None:
        """Become a standby of this primary, with a new copy of its data; the own data is lost."""
        self.kill()
        shutil.rmtree(self.data)
        for left in self.data.parent.glob(".s.PGSQL.*"):
            left.unlink()  # in a container, killed processes may stay as zombies, and seem to hold the lock
        self._primary = primary
        self._initialise(int(self.url.port or 0))
        self.start()

    def promote(self) -> None:
        """Make a standby the primary, and wait until it accepts writes."""
        self.run("pg_ctl", "promote", "--wait", f"--pgdata={self.data}")

    def kill(self) -> None:
        """Kill all processes of the server, as a loss of power would, and wait for their end."""
        signal_server(self.data, signal.SIGKILL)

    def stall(self) -> None:
        """Stop all processes: the kernel still accepts connections, but nothing answers."""
        signal_server(self.data, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a stalled server continue."""
        signal_server(self.data, signal.SIGCONT)

    def _initialise(self, port: int, *, fsync: bool = False) -> None:
        if self._primary is None:
            super()._initialise(port, fsync=fsync)
            self.configure(wal_retrieve_retry_interval="200ms")
            return
        address = self._primary.url
        source = f"host={address.host} port={address.port} user=postgres application_name={self.name}"
        self.run("pg_basebackup", f"--dbname={source}", f"--pgdata={self.data}", *COPY)
        folder = self.data.parent
        self.configure(port=port, unix_socket_directories=f"'{folder}'", synchronous_standby_names="''")


class Cluster:
    """A primary, and standbys that follow it from the beginning of the block on.

    A commit is acknowledged once `synchronous` of the standbys have it on disk. After `promote`, commits wait
    for no standby until `rejoin`: a promotion also says that the lost server is not needed.
    """

    def __init__(self, standbys: int = 1, *, synchronous: int = 1, primary: Node | None = None) -> None:
        self._first = primary
        self._number = standbys
        self._synchronous = synchronous
        self._servers = ExitStack()

    async def __aenter__(self) -> Self:
        with ExitStack() as servers:
            first = self._first or Node("node0")
            self.primary = await asyncio.to_thread(servers.enter_context, first)
            self.standbys = [
                await asyncio.to_thread(servers.enter_context, Node(f"node{number}", self.primary))
                for number in range(1, self._number + 1)
            ]
            await self._wait_for_standbys()
            self._servers = servers.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._servers.close)

    def url(self, *nodes: Node, database: str = "postgres", **parameters: str) -> str:
        """Return the URL of a database on these servers, by default on all, in the order of their names."""
        chosen = nodes or sorted([self.primary, *self.standbys], key=lambda node: node.name)
        places = ",".join(f"{node.url.host}:{node.url.port}" for node in chosen)
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://postgres@{places}/{database}{query and '?'}{query}"

    async def promote(self, standby: Node) -> None:
        """Make a standby the primary; the old one leaves the cluster."""
        await asyncio.to_thread(standby.promote)
        self.standbys.remove(standby)
        self.primary = standby

    async def rejoin(self, node: Node) -> None:
        """Make a former primary a standby of the present one."""
        await asyncio.to_thread(node.follow, self.primary)
        self.standbys.append(node)
        await self._wait_for_standbys()

    async def _wait_for_standbys(self) -> None:
        """Let commits wait for standbys, once these have been copied: otherwise all would wait for ever."""
        if not self._synchronous:
            return
        names = ", ".join(standby.name for standby in self.standbys)
        self.primary.configure(synchronous_standby_names=f"'ANY {self._synchronous} ({names})'")
        self.primary.reload()
        while await self.primary.fetch(SYNCHRONOUS) < self._synchronous:
            pass


def signal_server(data: Path, number: signal.Signals) -> None:
    """Send a signal to all processes of the server with this data; wait for their end if it kills them."""
    postmaster = _postmaster(data)
    if not postmaster:
        return
    os.kill(postmaster, signal.SIGSTOP)  # so that it starts no more processes
    for process in (*_children(postmaster), postmaster):
        with suppress(ProcessLookupError):
            file = os.pidfd_open(process)
            os.kill(process, number)
            if number == signal.SIGKILL:
                select([file], [], [])
            os.close(file)


def _postmaster(data: Path) -> int | None:
    """Return the id of the server's main process, or None if it does not run."""
    try:
        process = int((data / "postmaster.pid").read_text().partition("\n")[0])
        command = Path(f"/proc/{process}/cmdline").read_text()
    except FileNotFoundError:
        return None
    return process if str(data) in command else None


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
