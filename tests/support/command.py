"""The installed command `roster`, and other programs, in their own processes."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from click.testing import CliRunner, Result

ROSTER = Path(sys.executable).with_name("roster")
# With these, any number of servers can run at a time.
SERVER_DEFAULTS = {"ROSTER_LISTEN": "127.0.0.1:0", "ROSTER_METRICS_LISTEN": ""}


@dataclass(frozen=True)
class Ended:
    """The exit status of a process, and its output."""

    status: int | None
    out: str
    err: str


async def start(
    *command: str | Path, folder: Path | None = None, **environment: str
) -> asyncio.subprocess.Process:
    """Start a program; it inherits the environment except for settings of Roster.

    One of those is inherited: the mode of the pooler in `make test-pooler`.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "ROSTER_DATABASE_POOLER" or not re.match("ROSTER_|DATABASE_URL$", name)
    }
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=inherited | environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process, stdin: bytes = b"") -> Ended:
    """Send the rest of the standard input, wait for the process to end, and return how it ended."""
    out, err = await process.communicate(stdin)
    return Ended(process.returncode, out.decode(), err.decode())


async def run(
    *command: str | Path, folder: Path | None = None, stdin: bytes = b"", **environment: str
) -> Ended:
    """Run a program until it ends; it inherits the environment except for settings of Roster."""
    return await ended(await start(*command, folder=folder, **environment), stdin)


class Client:
    """Commands that call a server, run inside the test's process: that is faster than one for each."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def run(self, name: str, *arguments: str, stdin: bytes = b"") -> Ended:
        """Run a command until it ends. Standard input and output are not a terminal."""
        done = await asyncio.to_thread(self._invoke, name, [*arguments, "--address", self._address], stdin)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Ended(done.exit_code, done.stdout, done.stderr)

    def _invoke(self, name: str, arguments: list[str], stdin: bytes) -> Result:
        command = getattr(import_module(f"service.cli.{name}"), name)
        return CliRunner().invoke(command, arguments, stdin, prog_name=f"roster {name}")


class Roster:
    """`roster` as a client of one server, run in its own folder."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address
        folder.mkdir()

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start `roster` with these arguments."""
        return await start(ROSTER, *arguments, folder=self.folder, ROSTER_ADDRESS=self.address)

    async def run(self, *arguments: str, stdin: bytes = b"") -> Ended:
        """Run `roster` with these arguments until it ends."""
        return await ended(await self.start(*arguments), stdin)

    def write(self, name: str, *rows: object) -> str:
        """Write rows to a file of the folder, and return its name."""
        (self.folder / name).write_bytes(ndjson(*rows))
        return name

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.folder / name).read_bytes()

    def rejects(self, name: str) -> list[dict[str, object]]:
        """Return the rows of a file of rejects."""
        return [json.loads(line) for line in self.read(name).splitlines()]


def ndjson(*rows: object) -> bytes:
    """Return rows as lines of JSON; strings are lines already."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


class Serving:
    """A running `roster serve`; `address` is where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.address = address
        self.pid = process.pid
        self._process = process

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def said(self, words: str) -> None:
        """Wait until it prints these words on standard error."""
        await _line(self._process, words)

    async def ended(self) -> Ended:
        """Wait for its end; `err` is the output that `said` has not read."""
        return await ended(self._process)


@asynccontextmanager
async def waiting_to_serve(folder: Path, **environment: str) -> AsyncIterator[Serving]:
    """Run a `roster serve` that can't listen yet; kill it at the end of the block."""
    process = await start(ROSTER, "serve", folder=folder, **{**SERVER_DEFAULTS, **environment})
    try:
        yield Serving(process, "")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def serving(folder: Path, **environment: str) -> AsyncIterator[Serving]:
    """Run `roster serve` in a folder, by default on a free port; kill it at the end of the block."""
    process = await start(ROSTER, "serve", folder=folder, **{**SERVER_DEFAULTS, **environment})
    try:
        listening = await _line(process, "listening on ")
        yield Serving(process, listening.removeprefix("listening on "))
    finally:
        if process.returncode is None:
            process.kill()
        await ended(process)


async def _line(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stderr
    before = b""
    async for line in process.stderr:
        if words.encode() in line:
            return line.decode().rstrip("\n")
        before += line
    raise AssertionError(f"the process ended without printing {words!r}; it printed: {before.decode()}")
