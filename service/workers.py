"""Worker processes that share one port: started, supervised, measured and stopped together.

Each is a `roster serve --worker`; with SO_REUSEPORT the kernel distributes the connections among them. A
worker writes a line to standard output once it is serving. It stops when its standard input ends, and so also
when the supervisor is killed.
"""

import asyncio
import logging
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import TypeVar

from prometheus_client.multiprocess import mark_process_dead

from service import metrics
from service.settings import Settings
from service.variables import environment

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "service", "serve", "--worker")
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
SETTLED_SECONDS = 60  # a worker that ran for this long resets the pause before a restart
KILL_AFTER_SECONDS = 5  # after the grace

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Stop:
    """Signals to the workers: `asked` to finish calls and stop, or `forced` to end at once."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)


async def supervise(settings: Settings, stop: Stop, announce: Callable[[str], None]) -> int:
    """Run `settings.workers` processes until the stop; return the exit status.

    If the first worker can't start, its status is returned. Raises OSError if a port is in use.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        address = stack.enter_context(reserve(settings.listen, "ROSTER_LISTEN"))
        own = {"ROSTER_LISTEN": address, "ROSTER_METRICS_LISTEN": "", "PROMETHEUS_MULTIPROC_DIR": folder}
        if settings.health_listen:
            health = stack.enter_context(reserve(settings.health_listen, "ROSTER_HEALTH_LISTEN"))
            own["ROSTER_HEALTH_LISTEN"] = health
        workers = [Worker(own, folder, stop, settings.grace) for _ in range(settings.workers)]
        numbers = metrics.sum_workers(folder, lambda: [worker.pid for worker in workers if worker.pid])
        _, close_metrics = metrics.serve(settings, numbers)
        stack.callback(close_metrics)
        first, *others = workers
        if not await first.start():
            return await first.end()
        await asyncio.gather(*(worker.start() for worker in others))
        announce(address)
        await asyncio.gather(*(worker.keep() for worker in workers))
        return 0


class Worker:
    """One of the workers: its current process, which is replaced when it ends."""

    pid = 0  # while no process runs
    _process: Process

    def __init__(self, settings: Mapping[str, str], folder: str, stop: Stop, grace: float) -> None:
        self._environment = {**environment(), **settings}
        self._folder = folder
        self._stop = stop
        self._grace = grace

    async def start(self) -> bool:
        """Start a process, and return whether it is serving."""
        self._process = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=PIPE, stdout=PIPE, env=self._environment, start_new_session=True
        )
        self.pid = self._process.pid
        first_line = self._process.stdout.readline() if self._process.stdout else None
        return bool(first_line and await unless(self._stop.asked, first_line))

    async def keep(self) -> None:
        """Replace the process when it ends, after a growing pause; end it at the stop."""
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_SECONDS
        began = loop.time()
        while (status := await unless(self._stop.asked, self._process.wait())) is not None:
            pid, self.pid = self.pid, 0
            mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]
            if loop.time() - began > SETTLED_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            log.error("worker %d ended with status %d; restarting it in %g s", pid, status, pause)
            await unless(self._stop.asked, asyncio.sleep(pause))
            if self._stop.asked.is_set():
                return
            pause, began = min(2 * pause, LONGEST_PAUSE_SECONDS), loop.time()
            await self.start()
        await self.end()

    async def end(self) -> int:
        """Let the process finish, or kill it if it takes much longer than the grace; return its status."""
        if self._process.stdin:
            self._process.stdin.close()
        longest = self._grace + KILL_AFTER_SECONDS
        if await unless(self._stop.forced, self._process.wait(), longest) is None:
            self._process.kill()
        return await self._process.wait()


async def unless(
    event: asyncio.Event, work: Coroutine[None, None, ResultT], timeout: float | None = None
) -> ResultT | None:
    """Return the result of work; None if the event or the timeout comes first."""
    task, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    await asyncio.wait((task, waiting), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


@contextmanager
def reserve(listen: str, setting: str) -> Iterator[str]:
    """Reserve a port for the workers and yield the address; raises OSError if it is in use."""
    host, _, port = listen.rpartition(":")
    with ExitStack() as stack:
        try:
            *kind, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            with socket.socket(*kind) as probe:
                # This also fails if the workers of another Roster share the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                place = probe.getsockname()
            held = stack.enter_context(socket.socket(*kind))
            # Otherwise the connections of a server that has ended block the port for a minute.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(place)
        except OSError as error:
            raise OSError(
                f"can't listen on {listen}: {error.strerror}; set {setting} to another address"
            ) from None
        yield f"{host}:{place[1]}"
