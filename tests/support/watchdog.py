"""Find callbacks of the service that hold the event loop for too long.

The servers of most tests share a loop with the test. A callback belongs to the service if its task runs an
RPC handler or a coroutine of the package `service`; the test's own work is not counted.

It measures the CPU time of the loop's thread, so that other processes and threads do not matter much. They
compete for caches and for the core's other thread: a callback that is too long is compared with a fixed piece
of work. Time in the garbage collector is left out: the heap of a test process is many times that of a server.
"""

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import service

LIMIT_SECONDS = 0.020
HELD = "held the event loop"
WORK_SECONDS = 0.002  # the fixed piece of work, on two undisturbed cores of 2025
PACKAGE = str(Path(service.__file__).parent)
# The coroutine that runs each handler of a grpc.aio server; test_watchdog.py fails if it gets another name.
GRPC, HANDLER = "grpc._cython.cygrpc", "_handle_exceptions"

_Handle: Any = asyncio.Handle
_run = _Handle._run
_recorders: "list[Recorder]" = []


class Recorder:
    """The callbacks that held the loop for longer than the limit, and the longest of all."""

    def __init__(self) -> None:
        self.holds: list[str] = []
        self.longest_seconds = 0.0

    def add(self, name: str, seconds: float) -> None:
        """Record one callback of the service."""
        self.longest_seconds = max(self.longest_seconds, seconds)
        if seconds > LIMIT_SECONDS and seconds > LIMIT_SECONDS * _slowness():
            self.holds.append(f"{name} {HELD} for {seconds * 1000:.0f} ms of CPU")


def _work() -> float:
    """Return the CPU time of a fixed piece of work."""
    began = time.thread_time()
    sorted(f"{number}" for number in range(20_000))
    return time.thread_time() - began


def _slowness() -> float:
    """Return how many times as long as undisturbed the machine takes for its work now, at least 1."""
    return max(1.0, *(_work() / WORK_SECONDS for _ in range(3)))


class _Collector:
    """The CPU time of the garbage collector in the loop's thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __call__(self, phase: str, _: Any) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.seconds += time.thread_time() - self._began


_collector = _Collector()


@contextmanager
def watching() -> Iterator[Recorder]:
    """Record what callbacks of the service cost while the block runs; of nested blocks only the inner one."""
    recorder = Recorder()
    _recorders.append(recorder)
    if len(_recorders) == 1:
        gc.callbacks.append(_collector)
        _Handle._run = _measured_run
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)
        if not _recorders:
            _Handle._run = _run
            gc.callbacks.remove(_collector)


def _measured_run(handle: Any) -> None:
    name = _service_code(handle._callback)
    if name is None:
        _run(handle)
        return
    collecting, began = _collector.seconds, time.thread_time()
    _run(handle)
    seconds = time.thread_time() - began - (_collector.seconds - collecting)
    if _recorders:  # the block may have ended in this callback
        _recorders[-1].add(name, seconds)


def _service_code(callback: Any) -> str | None:
    """Return the name of the service's code that a callback runs, None if it runs other code."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return _service_coroutine(owner.get_coro())
    function = getattr(callback, "func", callback)
    is_service = str(getattr(function, "__module__", "")).startswith("service.")
    return str(getattr(function, "__qualname__", function)) if is_service else None


def _service_coroutine(coroutine: Any) -> str | None:
    name = str(getattr(coroutine, "__qualname__", ""))  # the end of an async generator has none
    if getattr(coroutine, "__module__", "") == GRPC:
        return "an RPC handler" if name == HANDLER else None
    code = getattr(coroutine, "cr_code", None)
    return name if code and code.co_filename.startswith(PACKAGE) else None
