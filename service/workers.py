"""Several processes on one port: started, watched, measured and stopped together.

Each is a `roster serve --worker`; by SO_REUSEPORT the kernel spreads the connections over them. A worker
says on its standard output when it serves, and stops when its standard input ends: so too when whoever
started it was killed.
"""

import asyncio
import logging
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from service import metrics
from service.settings import Settings

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "service", "serve", "--worker")
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
SETTLED_SECONDS = 60  # after one that lived so long the next one starts without a longer pause
KILL_AFTER_SECONDS = 5  # behind the grace


@dataclass(frozen=True)
class Stop:
    """What the workers are told: `asked` to end what they have in hand, or `forced` to end at once."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)


async def supervise(settings: Settings, stop: Stop, announce: Callable[[str], None]) -> int:
    """Keep `settings.workers` processes serving until the stop; return the status to end with.

    That is the first one's where it can't serve at all. Raises OSError where a port is taken.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        address = stack.enter_context(reserved(settings.listen, "ROSTER_LISTEN"))
        own = {"ROSTER_LISTEN": address, "ROSTER_METRICS_LISTEN": "", "PROMETHEUS_MULTIPROC_DIR": folder}
        if settings.health_listen:
            health = stack.enter_context(reserved(settings.health_listen, "ROSTER_HEALTH_LISTEN"))
            own["ROSTER_HEALTH_LISTEN"] = health
        workers = [Worker(own, folder, stop, settings.grace) for _ in range(settings.workers)]
        numbers = metrics.summed(folder, lambda: [worker.pid for worker in workers if worker.pid])
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
    """One place among the workers, and the process that has it now."""

    pid = 0  # while there is none
    _process: Process

    def __init__(self, settings: Mapping[str, str], folder: str, stop: Stop, grace: float) -> None:
        self._environment = {**os.environ, **settings}
        self._folder = folder
        self._stop = stop
        self._grace = grace

    async def start(self) -> bool:
        """Start a process, and tell whether it came to serve."""
        self._process = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=PIPE, stdout=PIPE, env=self._environment, start_new_session=True
        )
        self.pid = self._process.pid
        said = self._process.stdout.readline() if self._process.stdout else None
        return bool(said and await _unless(self._stop.asked, said))

    async def keep(self) -> None:
        """Start another process whenever one has ended, after a pause that grows; at the stop end it."""
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_SECONDS
        began = loop.time()
        while (status := await _unless(self._stop.asked, self._process.wait())) is not None:
            pid, self.pid = self.pid, 0
            mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]
            if loop.time() - began > SETTLED_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            log.error("worker %d ended with status %d; another starts in %g s", pid, status, pause)
            await _unless(self._stop.asked, asyncio.sleep(pause))
            if self._stop.asked.is_set():
                return
            pause, began = min(2 * pause, LONGEST_PAUSE_SECONDS), loop.time()
            await self.start()
        await self.end()

    async def end(self) -> int:
        """Let the process end what it has in hand, kill it if it is there much longer; return its status."""
        if self._process.stdin:
            self._process.stdin.close()
        patience = self._grace + KILL_AFTER_SECONDS
        if await _unless(self._stop.forced, self._process.wait(), patience) is None:
            self._process.kill()
        return await self._process.wait()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
    """Return what comes of some work, None where an event, or the end of the time, comes first."""
    tasks = task, told = asyncio.create_task(work), asyncio.create_task(event.wait())
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    return task.result() if task.done() else task.cancel() and None


@contextmanager
def reserved(listen: str, setting: str) -> Iterator[str]:
    """Hold a port that only processes of ours can share, and yield the address; raises OSError."""
    host, _, port = listen.rpartition(":")
    with ExitStack() as stack:
        try:
            *kind, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            with socket.socket(*kind) as probe:
                # Fails also where another Roster shares the port among its workers.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                place = probe.getsockname()
            held = stack.enter_context(socket.socket(*kind))
            # Connections of a server that has ended keep the port for a minute from whoever doesn't say so.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(place)
        except OSError as error:
            told = f"can't listen on {listen}: {error.strerror}; {setting} names another address"
            raise OSError(told) from None
        yield f"{host}:{place[1]}"
