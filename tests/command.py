"""The command `roster` as a person runs it: a process of its own, in a folder of the test's own."""

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROSTER = (sys.executable, "-m", "service")


@dataclass
class Ended:
    """How the command ended."""

    status: int | None
    out: str
    err: str


class Roster:
    """Runs the command; files are those of its folder."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address
        folder.mkdir()

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start `roster` with these arguments."""
        return await asyncio.create_subprocess_exec(
            *ROSTER,
            *arguments,
            cwd=self.folder,
            env={**os.environ, "ROSTER_ADDRESS": self.address},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str, stdin: bytes = b"") -> Ended:
        """Run it to its end."""
        return await ended(await self.start(*arguments), stdin)

    def write(self, name: str, *rows: object) -> str:
        """Write a file of rows, and return its name."""
        (self.folder / name).write_bytes(ndjson(*rows))
        return name

    def read(self, name: str) -> bytes:
        """Return what is in a file."""
        return (self.folder / name).read_bytes()

    def rejects(self, name: str) -> list[dict[str, object]]:
        """Return the rows of a file of rejects."""
        return [json.loads(line) for line in self.read(name).splitlines()]


async def ended(process: asyncio.subprocess.Process, stdin: bytes = b"") -> Ended:
    """Return how a process ended, once it did; it may read some more before."""
    out, err = await process.communicate(stdin)
    return Ended(process.returncode, out.decode(), err.decode())


def ndjson(*rows: object) -> bytes:
    """Return rows as lines of JSON; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()
