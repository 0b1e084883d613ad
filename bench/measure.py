"""Runs processes and measures them: their time, and the CPU of PostgreSQL, the server and the client."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
ANNOUNCEMENT = "listening on "
STOP_SECONDS = 60


@dataclass(frozen=True)
class Approach:
    """A process that writes rows; its last argument is a database URL, or the address of the server.

    The process prints `ready` (psql only after `greeting`), reads `script`, and prints `answer` at the end.
    """

    name: str
    rows: int
    command: tuple[str | Path, ...]
    answer: str
    script: str = "\n"
    greeting: str = ""
    through_server: bool = False


@dataclass(frozen=True)
class Run:
    """The result of one run: rows, time and CPU, in seconds."""

    rows: int
    seconds: float
    postgresql: float
    server: float
    client: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds

    def cpu(self, part: str) -> float:
        """Return the CPU per row of `postgresql`, `server` or `client`, in microseconds."""
        return float(getattr(self, part)) / self.rows * 1e6


def run(approach: Approach, url: str, postmaster: int) -> Run:
    """Run an approach with new processes; raises RuntimeError if it does not print its answer."""
    with ExitStack() as processes:
        server, target = processes.enter_context(start_server(url)) if approach.through_server else (0, url)
        client = processes.enter_context(start_process(*approach.command, target))
        expect("ready", client, approach.greeting)
        parts = {"postgresql": postmaster, "server": server, "client": client.pid}
        before = {part: cpu_seconds(pid) for part, pid in parts.items()}
        start = perf_counter()
        expect(approach.answer, client, approach.script)
        seconds = perf_counter() - start
        used = {part: cpu_seconds(pid) - before[part] for part, pid in parts.items()}
    return Run(approach.rows, seconds, **used)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its descendants, including ended ones; 0 for pid 0."""
    used: dict[int, int] = {}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        id = int(stat.parent.name)
        parents[id] = int(fields[1])
        used[id] = sum(map(int, fields[11:15]))  # user and system, of the process and of its ended children
    return sum(used[id] for id in used if pid in _ancestors(id, parents)) / TICKS


def _ancestors(id: int, parents: dict[int, int]) -> Iterator[int]:
    while id in parents:
        yield id
        id = parents[id]


@contextmanager
def start_server(url: str, *command: str) -> Iterator[tuple[int, str]]:
    """Start `roster serve`, or another command; yield its pid and its address."""
    settings = {"DATABASE_URL": url, "LISTEN": "127.0.0.1:0", "METRICS_LISTEN": "", "LOG_LEVEL": "WARNING"}
    with start_process(
        *(sys.executable, "-m", *(command or ("service", "serve"))),
        stderr=subprocess.PIPE,
        env={**os.environ, **{f"ROSTER_{name}": value for name, value in settings.items()}},
    ) as server:
        lines = []
        for line in server.stderr:
            if line.startswith(ANNOUNCEMENT):
                yield server.pid, line.removeprefix(ANNOUNCEMENT).strip()
                return
            lines.append(line)
    raise RuntimeError(f"the server did not start: {''.join(lines)}")


@contextmanager
def start_process(*command: str | Path, **options: Any) -> Iterator[Any]:
    """Start a process that reads and writes lines; terminate it at the end of the block."""
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, **options
    )
    try:
        yield started
    finally:
        started.terminate()
        started.communicate(timeout=STOP_SECONDS)


def ask(started: Any, text: str) -> str:
    """Write a text to a process, and return the line that it prints."""
    started.stdin.write(text)
    started.stdin.flush()
    return str(started.stdout.readline().strip())


def expect(answer: str, started: Any, text: str) -> None:
    """Write a text to a process; raises RuntimeError unless it prints the answer."""
    line = ask(started, text)
    if line != answer:
        raise RuntimeError(f"{started.args[:4]} printed {line!r} instead of {answer!r}")
