"""Two releases of Roster on one machine: this one, and the one before it, built from its commit."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from fcntl import LOCK_EX, flock
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc

from tests.support.command import SERVER_DEFAULTS, Ended, ended, start

CHECKOUT = Path(__file__).parents[2]
# The last commit whose servers know neither the schema window nor loads per caller.
PREVIOUS = "3585956e51ab4b4b79904020a178c91e7ead9e18"

RECONNECT_OFTEN = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]


class Release:
    """A release: runs `roster` from a folder of packages, or the one of this checkout."""

    def __init__(self, folder: Path, database_url: str, packages: Path | None = None) -> None:
        self._folder = folder
        self._environment = {"ROSTER_DATABASE_URL": database_url}
        if packages:
            self._environment["PYTHONPATH"] = str(packages)

    async def start(self, *arguments: str, **settings: str) -> asyncio.subprocess.Process:
        """Start `roster` with these arguments."""
        command = (sys.executable, "-m", "service", *arguments)
        return await start(*command, folder=self._folder, **self._environment, **settings)

    async def run(self, *arguments: str, **settings: str) -> Ended:
        """Run `roster` with these arguments until it ends."""
        return await ended(await self.start(*arguments, **settings))


class Slot:
    """A place for one server: an address that stays while the server is replaced."""

    def __init__(self, stop_signal: signal.Signals) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._stop_signal = stop_signal
        self._server: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[Ended] | None = None

    async def replace(self, release: Release) -> None:
        """Stop the server, start one of this release, and wait until it serves."""
        await self.stop()
        settings = {**SERVER_DEFAULTS, "ROSTER_LISTEN": self.address, "ROSTER_DRAIN_PAUSE": "0"}
        self._server = await release.start("serve", **settings)
        self._output = asyncio.create_task(ended(self._server))  # an unread pipe would stop it
        async with grpc.aio.insecure_channel(self.address, RECONNECT_OFTEN) as channel:
            ready = asyncio.create_task(channel.channel_ready())
            await asyncio.wait([ready, self._output], return_when=asyncio.FIRST_COMPLETED)
            assert ready.done(), self._output.result().err
            await ready

    async def stop(self) -> None:
        """Stop the server in the way of this slot, and wait for its end."""
        if self._server and self._output:
            if self._server.returncode is None:
                self._server.send_signal(self._stop_signal)
            await self._output
        self._server = self._output = None


def install_previous() -> Path:
    """Return the folder of the previous release's packages, built once from its commit.

    Raises FileNotFoundError if this is not a clone, or a shallow one without the commit.
    """
    folder = CHECKOUT / ".tools" / f"roster-{PREVIOUS[:7]}"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "roster.lock").open("w") as lock:
        flock(lock, LOCK_EX)  # test processes run in parallel
        if not folder.exists():
            _build(folder)
    return folder


def _build(folder: Path) -> None:
    archive = subprocess.run(
        ["git", "-C", CHECKOUT, "archive", "--format=tar", PREVIOUS], capture_output=True, check=False
    )
    if archive.returncode:
        raise FileNotFoundError(f"commit {PREVIOUS} is not here: {archive.stderr.decode().strip()}")
    with TemporaryDirectory() as temporary:
        source, target = Path(temporary, "source"), Path(temporary, "target")
        source.mkdir()
        subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
        # Its dependencies are those of this release.
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, "--target", target, source],
            check=True,
            env={**os.environ, "PIP_NO_INDEX": "1"},
        )
        shutil.move(target, folder)
