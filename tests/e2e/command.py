"""The installed command `roster`, and other programs, as processes of their own."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

# Any number of servers at a time.
DEFAULTS = {"ROSTER_LISTEN": "127.0.0.1:0", "ROSTER_METRICS_LISTEN": ""}
ROSTER = Path(sys.executable).with_name("roster")


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    status: int | None
    out: str
    err: str


async def run(
    *command: str | Path, folder: Path | None = None, stdin: bytes = b"", **environment: str
) -> Ended:
    """Run a program to its end; of Roster's settings it has those given and none of ours."""
    process = await _start(*command, folder=folder, **environment)
    return await _end(process, stdin)


class Serving:
    """A `roster serve` that listens on `address`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.address = address
        self.pid = process.pid
        self._process = process

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def said(self, words: str) -> None:
        """Wait until it says this on standard error."""
        await _line(self._process, words)

    async def ended(self) -> Ended:
        """Wait for its end; `err` is what `said` did not read."""
        return await _end(self._process)


@asynccontextmanager
async def waiting_to_serve(folder: Path, **environment: str) -> AsyncIterator[Serving]:
    """Run a `roster serve` that does not come to listen; kill it if it is still there."""
    process = await _start(ROSTER, "serve", folder=folder, **{**DEFAULTS, **environment})
    try:
        yield Serving(process, "")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def serving(folder: Path, **environment: str) -> AsyncIterator[Serving]:
    """Run `roster serve` in a folder, on a free port unless told otherwise; kill it if it is still there."""
    process = await _start(ROSTER, "serve", folder=folder, **{**DEFAULTS, **environment})
    try:
        listening = await _line(process, "listening on ")
        yield Serving(process, listening.removeprefix("listening on "))
    finally:
        if process.returncode is None:
            process.kill()
        await _end(process)


async def _start(*command: str | Path, folder: Path | None, **environment: str) -> asyncio.subprocess.Process:
    ours = {name: value for name, value in os.environ.items() if not re.match("ROSTER_|DATABASE_URL$", name)}
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=ours | environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def _end(process: asyncio.subprocess.Process, stdin: bytes = b"") -> Ended:
    out, err = await process.communicate(stdin)
    return Ended(process.returncode, out.decode(), err.decode())


async def _line(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stderr
    before = b""
    async for line in process.stderr:
        if words.encode() in line:
            return line.decode().rstrip("\n")
        before += line
    raise AssertionError(f"it ended without saying {words!r}, but: {before.decode()}")
