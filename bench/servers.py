"""The servers to compare: Roster as it is installed, and its peers."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep

from bench.measure import start_process
from bench.peers.build import GO_PEER, NODE_PEER

ROSTER = "Roster"
AGAIN = "Roster again"  # the same, started twice: how far two equal things differ
QUIET = "Roster without log lines"
BARE = "Roster without interceptors"
NO_OP = "no-op"
GO = "Go"
NODE = "Node"
RAW = "Python, asyncpg"
TEXTBOOK = "Python, ORM"
PEERS = (GO, NODE, RAW, TEXTBOOK)

ANNOUNCEMENT = "listening on "
START_SECONDS = 30
POLL_SECONDS = 0.005
# Any free ports. Everything else is Roster's default; log lines go to a file, as JSON.
SETTINGS = {"ROSTER_LISTEN": "127.0.0.1:0", "ROSTER_METRICS_LISTEN": "127.0.0.1:0"}
SERVE = (sys.executable, "-m", "service", "serve")


@dataclass(frozen=True)
class Server:
    """How to start a server; `needs` is what `make bench-peers` builds for it."""

    command: tuple[str | Path, ...]
    needs: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """A server that listens, and the seconds that its start took."""

    pid: int
    address: str
    seconds: float


SERVERS = {
    ROSTER: Server(SERVE),
    AGAIN: Server(SERVE),
    QUIET: Server(SERVE, settings={"ROSTER_LOG_LEVEL": "WARNING"}),
    BARE: Server((sys.executable, "-m", "bench.bare_server")),
    NO_OP: Server((sys.executable, "-m", "bench.peers.no_op")),
    GO: Server((GO_PEER,), needs=GO_PEER),
    NODE: Server(("node", NODE_PEER), needs=NODE_PEER),
    RAW: Server((sys.executable, "-m", "bench.peers.raw_python")),
    TEXTBOOK: Server((sys.executable, "-m", "bench.peers.textbook_python")),
}


def available(*names: str) -> list[str]:
    """Return the servers that have been built, and name the others."""
    missing = [name for name in names if (needs := SERVERS[name].needs) and not needs.exists()]
    for name in missing:
        print(f"{name} is left out: run `make bench-peers`", file=sys.stderr)
    return [name for name in names if name not in missing]


@contextmanager
def start_server(name: str, url: str, **settings: str) -> Iterator[Started]:
    """Start a server and wait until it listens; stop it at the end of the block."""
    server = SERVERS[name]
    variables = {"DATABASE_URL": url, "ROSTER_DATABASE_URL": url, **SETTINGS, **server.settings, **settings}
    start = perf_counter()
    with (
        tempfile.NamedTemporaryFile("w+") as log,
        start_process(*server.command, stderr=log, env={**os.environ, **variables}) as process,
    ):
        address = _wait(process, Path(log.name))
        yield Started(process.pid, address, perf_counter() - start)


def _wait(process: subprocess.Popen[str], log: Path) -> str:
    """Return the address that a server announces in its log."""
    end = perf_counter() + START_SECONDS
    while perf_counter() < end and process.poll() is None:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith(ANNOUNCEMENT) and line.endswith("\n"):
                return line.removeprefix(ANNOUNCEMENT).strip()
        sleep(POLL_SECONDS)
    raise RuntimeError(f"{process.args} did not start: {log.read_text()}")
