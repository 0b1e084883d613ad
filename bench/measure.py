"""Runs processes and measures them: their time, and the CPU of PostgreSQL, the server and the client."""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 60


@dataclass(frozen=True)
class Run:
    """The result of one run: calls or rows, and the seconds and CPU seconds that they took."""

    count: int
    seconds: float
    server: float = 0
    postgresql: float = 0
    workers: float = 0  # of Citus
    client: float = 0
    p50: float = 0  # of a call, in seconds
    p99: float = 0
    mib: float = 0  # of memory

    @property
    def rate(self) -> float:
        """Calls or rows per second."""
        return self.count / self.seconds

    def cpu(self, part: str) -> float:
        """Return the CPU of a part, such as `server`, in microseconds per call or row."""
        return float(getattr(self, part)) / self.count * 1e6


@dataclass(frozen=True)
class Approach:
    """A process that writes rows; its last argument is a database URL, or the address of a server.

    The process prints `ready` (psql only after `greeting`), reads `script`, and prints `answer` at the end.
    """

    name: str
    rows: int
    command: tuple[str | Path, ...]
    answer: str
    script: str = "\n"
    greeting: str = ""
    through_server: bool = False


Thing = Callable[[], Awaitable[Run]]
Runs = dict[str, list[Run]]


async def take_turns(title: str, things: Mapping[str, Thing], rounds: int) -> Runs:
    """Run each thing once per round; every other round runs in reverse order."""
    runs: Runs = {name: [] for name in things}
    for number in range(rounds):
        print(f"{title}: round {number + 1} of {rounds}", file=sys.stderr)
        for name in list(things)[:: -1 if number % 2 else 1]:
            runs[name].append(await things[name]())
    return runs


class Clock:
    """Measures the time and the CPU of processes from its creation on.

    A part can be several processes. Without a pid of a client, its CPU is that of the processes that ended
    meanwhile.
    """

    def __init__(self, **parts: int | Sequence[int]) -> None:
        self._pids = {part: [pids] if isinstance(pids, int) else pids for part, pids in parts.items()}
        self._children = cpu_of_children()
        self._before = {part: cpu_seconds(*pids) for part, pids in self._pids.items()}
        self._start = perf_counter()

    def stop(self, count: int, seconds: float = 0, **more: float) -> Run:
        """Return what was measured; `seconds` if the process measured its time itself."""
        seconds = seconds or perf_counter() - self._start
        used = {"client": cpu_of_children() - self._children}
        used |= {part: cpu_seconds(*pids) - self._before[part] for part, pids in self._pids.items()}
        return Run(count, seconds, **(used | more))


def cpu_of_children() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_seconds(*pids: int) -> float:
    """Return the CPU seconds of processes and their descendants, including ended ones; 0 for pid 0."""
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
    return sum(used[id] for id in used if not set(pids).isdisjoint(_ancestors(id, parents))) / TICKS


def _ancestors(id: int, parents: dict[int, int]) -> Iterator[int]:
    while id in parents:
        yield id
        id = parents[id]


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
