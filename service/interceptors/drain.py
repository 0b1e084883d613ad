"""The calls in flight, so that a stop can wait for each one's last `finally`."""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from service.db.engine import COMMITTED
from service.errors import Draining, OutcomeUnknown
from service.interceptors.chain import Around, Context, Proceed


class Drain(Around):
    """Knows the tasks of all calls: grpc.aio's own stop doesn't wait for them (grpc#37239)."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._cut_off: set[asyncio.Task[Any]] = set()

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        self._tasks[task] = method
        try:
            return await proceed(request, context)
        except asyncio.CancelledError as cancelled:
            if task not in self._cut_off:
                raise
            task.uncancel()
            if COMMITTED in cancelled.args:  # not to be repeated by a client that knows no request_id
                raise OutcomeUnknown("the server stopped behind the commit; the write is in") from None
            raise Draining("the server stopped before this call was done; send it again") from None
        finally:
            del self._tasks[task]
            self._cut_off.discard(task)

    @property
    def is_busy(self) -> bool:
        """Whether any call is in flight."""
        return bool(self._tasks)

    async def wait(self, timeout: float, besides: Collection[str] = ()) -> None:
        """Wait until no call is in flight besides those of some methods, so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while tasks := [task for task, method in self._tasks.items() if method not in besides]:
                    await asyncio.wait(tasks)

    def cut_off(self, methods: Collection[str] | None = None) -> None:
        """End the calls in flight, all or those of some methods; each is told to try again."""
        tasks = {task for task, method in self._tasks.items() if methods is None or method in methods}
        self._cut_off |= tasks
        for task in tasks:
            task.cancel()
