"""Programs in a terminal of a given width: a real pseudo-terminal."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROWS = 24


class Terminal:
    """A terminal, and the process in it; `output` is everything that it has shown so far."""

    def __init__(self, process: asyncio.subprocess.Process, master: int) -> None:
        self.process = process
        self.output = ""
        self._master = master
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    def type(self, text: str) -> None:
        """Type something, such as the character of Ctrl-C."""
        os.write(self._master, text.encode())

    async def shows(self, words: str) -> None:
        """Wait until the terminal has shown these words."""
        while words not in self.plain:
            self._changed.clear()
            assert self.process.returncode is None, self.output
            await self._changed.wait()

    async def ended(self) -> int:
        """Wait for the end of the process, and return its status."""
        status = await self.process.wait()
        self._read()
        return status

    @property
    def plain(self) -> str:
        """The output without escape sequences."""
        return ESCAPES.sub("", self.output)

    @property
    def lines(self) -> list[str]:
        """Its lines; what a carriage return has overwritten is a line of its own."""
        return [line for line in re.split(r"[\r\n]+", self.plain) if line]

    def close(self) -> None:
        """Close the terminal."""
        asyncio.get_running_loop().remove_reader(self._master)
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 1 << 16)
            except (BlockingIOError, OSError):  # nothing there; EIO at the end
                break
            if not data:
                break
            self.output += data.decode(errors="replace")
        self._changed.set()


@asynccontextmanager
async def terminal(
    *command: str | Path, columns: int, folder: Path, stdout: Path | None = None, **environment: str
) -> AsyncIterator[Terminal]:
    """Run a program in a terminal with these columns; its standard output may go to a file instead."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    os.set_blocking(master, False)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not re.match("ROSTER_|DATABASE_URL$|COLUMNS$|LINES$|NO_COLOR$", name)
    }
    out = os.open(stdout, os.O_WRONLY | os.O_CREAT, 0o600) if stdout else slave
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**inherited, "TERM": "xterm-256color", **environment},
        stdin=slave,
        stdout=out,
        stderr=slave,
        start_new_session=True,
        preexec_fn=partial(fcntl.ioctl, slave, termios.TIOCSCTTY, 0),
    )
    shown = Terminal(process, master)
    try:
        yield shown
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        shown.close()
        os.close(slave)
        if stdout:
            os.close(out)
