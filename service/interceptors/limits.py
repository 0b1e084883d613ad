"""Limits of what one caller may take, and of what the server takes on: a guard against runaways."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from service.auth.caller import current_share
from service.auth.policy import HEALTH
from service.errors import Overloaded, QuotaExceeded, RateLimited, RosterError
from service.interceptors.chain import Around, Context, Proceed
from service.settings import Settings
from service.shares import FairSemaphore

BURST_SECONDS = 1
# Those of callers who stay away are forgotten once there are so many.
MANY_USES = 1000

Key = tuple[str, str]  # who calls what


@dataclass(slots=True)
class Use:
    """What one caller takes of one method: calls in flight, and until when tokens are spent (GCRA)."""

    in_flight: int = 0
    spent_until: float = 0.0


class Limits(Around):
    """Bounds calls in flight and calls a second by caller and method, and calls in flight in all.

    A caller's own limit is QuotaExceeded or RateLimited, the server's is Overloaded; nothing was done.
    Of the calls in flight in all a caller may have its fair share, whatever the methods.
    A stream whose client sends nothing for too long is QuotaExceeded. One whose client does not read keeps
    its place instead: gRPC sends no status past messages that wait. Health is never refused.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._settings = settings
        self._now = now
        self._streams: set[str] = set()
        self._uploads: set[str] = set()
        self._calls = FairSemaphore(settings.max_calls)
        self._uses: dict[Key, Use] = {}

    def wrap(self, method: str, handler: Any) -> Any:
        if method in HEALTH:
            return handler
        if handler.request_streaming or handler.response_streaming:
            self._streams.add(method)
        if handler.request_streaming:
            self._uploads.add(method)
        return super().wrap(method, handler)

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        caller = current_share()
        use = self._use((caller, method))
        self._admit(method, use)
        if not self._calls.try_acquire(caller):
            raise self._refusal(caller)
        use.in_flight += 1
        try:
            return await proceed(self._patient(request) if method in self._uploads else request, context)
        finally:
            self._calls.release(caller)
            use.in_flight -= 1

    async def _patient(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        seconds = self._settings.stream_idle_timeout
        while True:
            try:
                async with asyncio.timeout(seconds):
                    request = await anext(requests, None)
            except TimeoutError:
                raise QuotaExceeded(f"nothing was sent for {seconds:g} s; open another stream") from None
            if request is None:
                return
            yield request

    def _use(self, key: Key) -> Use:
        use = self._uses.get(key)
        if use is None:
            if len(self._uses) >= MANY_USES:
                now = self._now()
                self._uses = {k: u for k, u in self._uses.items() if u.in_flight or u.spent_until > now}
            use = self._uses[key] = Use()
        return use

    def _admit(self, method: str, use: Use) -> None:
        is_stream = method in self._streams
        most = self._settings.caller_streams if is_stream else self._settings.caller_calls
        if use.in_flight >= most:
            raise QuotaExceeded(
                f"{most} calls of this method are in flight already; wait until some have ended"
            )
        now, rate = self._now(), self._settings.caller_rate
        until = max(use.spent_until, now)
        if until - now >= BURST_SECONDS:
            raise RateLimited(f"this method was called more than {rate} times a second; slow down")
        use.spent_until = until + 1 / rate

    def _refusal(self, caller: str) -> RosterError:
        if self._calls.free:
            return QuotaExceeded(
                f"this caller has {self._calls.held(caller)} calls in flight, which is its share of "
                f"{self._calls.size}; wait until some have ended"
            )
        return Overloaded("the server has too many calls in flight; nothing was done, try again")
