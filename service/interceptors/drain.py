"""Tracks calls in flight, so that shutdown can wait for their cleanup."""

import asyncio
from contextlib import suppress

from roster.errors import Draining, OutcomeUnknown
from service.auth.policy import REFLECTION
from service.db.engine import CancelledAfterCommit
from service.interceptors.chain import Context, Proceed, Request, Response, Rpc


class Drain:
    """Tracks the tasks of all calls, because grpc.aio's own stop doesn't wait for them (grpc#37239).

    Streams of reflection are not tracked: grpcurl keeps one open until its own input ends, and they have
    nothing to clean up.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut_off: set[asyncio.Task[None]] = set()
        self._is_idle = asyncio.Event()

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Track the calls of an RPC; a call that is cut off fails with Draining or OutcomeUnknown."""
        if rpc.path in REFLECTION:
            return proceed

        async def track(request: Request, context: Context) -> Response:
            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("a call runs in a task")
            self._tasks.add(task)
            try:
                return await proceed(request, context)
            except asyncio.CancelledError as cancelled:
                if task not in self._cut_off:
                    raise
                task.uncancel()
                raise _error(cancelled) from None
            finally:
                self._tasks.discard(task)
                self._cut_off.discard(task)
                if not self._tasks:
                    self._is_idle.set()

        return track

    @property
    def is_busy(self) -> bool:
        """Whether any call is in flight."""
        return bool(self._tasks)

    async def wait(self, timeout: float) -> None:
        """Wait until no call is in flight, for at most `timeout` seconds.

        A call whose client does not read is over before its task, which sends the status.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._tasks:
                    self._is_idle.clear()
                    await self._is_idle.wait()

    def cut_off(self) -> None:
        """Cancel the calls in flight. Their callers get an error that says whether to send the call again."""
        self._cut_off |= self._tasks
        for task in self._tasks:
            task.cancel()


def _error(cancelled: asyncio.CancelledError) -> Draining | OutcomeUnknown:
    # Draining would invite a client that sent no request_id to write twice.
    if isinstance(cancelled, CancelledAfterCommit):
        return OutcomeUnknown("the server stopped after the commit; the write is stored")
    return Draining("the server stopped before this call was finished; send it again")
