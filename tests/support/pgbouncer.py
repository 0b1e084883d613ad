"""A real PgBouncer in front of a PostgreSQL of the tests."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import asyncpg
from sqlalchemy import make_url

from tests.support.programs import Program, program

Mode = Literal["session", "transaction", "statement"]

SERVERS: dict[int, str] = {}  # the URL of PostgreSQL, by the port of the pooler in front of it
START_SECONDS = 10
POLL_SECONDS = 0.02


class PgBouncer:
    """A PgBouncer on a free port of 127.0.0.1; a client of the admin console is the user postgres."""

    def __init__(self, folder: Path, server: str, mode: Mode, settings: dict[str, Any]) -> None:
        self._program = _program()
        self._configuration = folder / "pgbouncer.ini"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        url = make_url(server)
        SERVERS[self.port] = server
        (folder / "users").write_text('"postgres" ""\n')
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": folder / "users",
            "admin_users": "postgres",
            "pool_mode": mode,
            "default_pool_size": 4,
            "max_client_conn": 500,
            # Of the tests: errors come soon, and a server that restarts is used soon.
            "server_login_retry": 1,
            **settings,
        }
        options = "".join(f"{name} = {value}\n" for name, value in lines.items())
        self._configuration.write_text(
            f"[databases]\n* = host={url.host} port={url.port}\n[pgbouncer]\n{options}"
        )
        self._log = folder / "log"
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it accepts connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program.path, *_user(), self._configuration],
                env=self._program.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"PgBouncer did not start: {self._log.read_text()}") from None
                time.sleep(POLL_SECONDS)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process with all its connections."""
        if self._process.poll() is None:
            self._process.send_signal(how)
            if how != signal.SIGKILL:
                self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def url(self, direct: str) -> str:
        """Return the URL of a database through this pooler."""
        return make_url(direct).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    async def command(self, command: str) -> None:
        """Execute a command of the admin console, such as RECONNECT."""
        console = await asyncpg.connect(
            host="127.0.0.1", port=self.port, user="postgres", database="pgbouncer"
        )
        try:
            await console.execute(command)
        finally:
            await console.close()

    def log(self) -> str:
        """Return what it has logged."""
        return self._log.read_text()


@contextmanager
def pgbouncer(server: str, mode: Mode = "transaction", **settings: Any) -> Iterator[PgBouncer]:
    """Run a PgBouncer in front of the PostgreSQL of a URL, with these settings of its file."""
    folder = Path(tempfile.mkdtemp(prefix="roster-pgbouncer-", dir="/tmp"))
    folder.chmod(0o755)  # it reads its files as another user
    try:
        pooler = PgBouncer(folder, server, mode, settings)
        try:
            yield pooler
        finally:
            pooler.stop()
    finally:
        rmtree(folder)


def direct(url: str) -> str:
    """Return the URL of a database without the pooler that its own URL may name."""
    pooled = make_url(url)
    server = SERVERS.get(pooled.port or 0)
    place = make_url(server) if server else pooled
    return pooled.set(host=place.host, port=place.port).render_as_string(hide_password=False)


def _program() -> Program:
    """Return the program of ROSTER_TEST_PGBOUNCER, or the one on this machine."""
    path = os.environ.get("ROSTER_TEST_PGBOUNCER")
    return Program(Path(path), {"PATH": os.defpath}) if path else program("pgbouncer")


def _user() -> list[str]:
    """Return the option for the user to run as: nobody for root, which PgBouncer refuses."""
    return ["--user=nobody"] if os.geteuid() == 0 else []
