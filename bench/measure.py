"""Processes that are measured: one run of one way to write rows, how long it took, and whose CPU."""

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
class Way:
    """A process that writes rows into the database, or to the server, that is its last argument.

    It says `ready`, is given `script`, and says `answer` when all is done; `greeting` makes it say `ready`.
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
    """What a run took, CPU in seconds."""

    rows: int
    seconds: float
    postgresql: float
    server: float
    client: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds

    def cpu(self, part: str) -> float:
        """Return the microseconds of a part's CPU that a row took."""
        return float(getattr(self, part)) / self.rows * 1e6


def run(way: Way, url: str, postmaster: int) -> Run:
    """Run a way from a standing start; raises RuntimeError where it does not end as it should."""
    with ExitStack() as processes:
        server, target = processes.enter_context(serving(url)) if way.through_server else (0, url)
        client = processes.enter_context(process(*way.command, target))
        expect("ready", client, way.greeting)
        parts = {"postgresql": postmaster, "server": server, "client": client.pid}
        before = {part: cpu_seconds(pid) for part, pid in parts.items()}
        start = perf_counter()
        expect(way.answer, client, way.script)
        seconds = perf_counter() - start
        used = {part: cpu_seconds(pid) - before[part] for part, pid in parts.items()}
    return Run(way.rows, seconds, **used)


def cpu_seconds(pid: int) -> float:
    """Return the CPU that a process and all below it have used, ended ones included; 0 for none."""
    used: dict[int, int] = {}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        id = int(stat.parent.name)
        parents[id] = int(fields[1])
        used[id] = sum(map(int, fields[11:15]))  # user, system; both again of children waited for
    return sum(used[id] for id in used if pid in _line(id, parents)) / TICKS


def _line(id: int, parents: dict[int, int]) -> Iterator[int]:
    while id in parents:
        yield id
        id = parents[id]


@contextmanager
def serving(url: str, *command: str) -> Iterator[tuple[int, str]]:
    """Start a server, `roster serve` unless another is named; yield its pid and its address."""
    settings = {"DATABASE_URL": url, "LISTEN": "127.0.0.1:0", "METRICS_LISTEN": "", "LOG_LEVEL": "WARNING"}
    with process(
        *(sys.executable, "-m", *(command or ("service", "serve"))),
        stderr=subprocess.PIPE,
        env={**os.environ, **{f"ROSTER_{name}": value for name, value in settings.items()}},
    ) as server:
        said = []
        for line in server.stderr:
            if line.startswith(ANNOUNCEMENT):
                yield server.pid, line.removeprefix(ANNOUNCEMENT).strip()
                return
            said.append(line)
    raise RuntimeError(f"the server did not start: {''.join(said)}")


@contextmanager
def process(*command: str | Path, **options: Any) -> Iterator[Any]:
    """Start a process that is spoken to by lines; it is ended with the block."""
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, **options
    )
    try:
        yield started
    finally:
        started.terminate()
        started.communicate(timeout=STOP_SECONDS)


def told(started: Any, said: str) -> str:
    """Return the line that a process answers."""
    started.stdin.write(said)
    started.stdin.flush()
    return str(started.stdout.readline().strip())


def expect(answer: str, started: Any, said: str) -> None:
    """Raise RuntimeError unless a process answers so."""
    line = told(started, said)
    if line != answer:
        raise RuntimeError(f"{started.args[:4]} said {line!r} instead of {answer!r}")
