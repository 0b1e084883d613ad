"""What one caller may take, and what the server takes on: a guard against runaways, not a plan of quotas."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from service.caller import current_caller
from service.errors import Overloaded, QuotaExceeded, RateLimited
from service.interceptors.around import Around, Context, Proceed
from service.policy import HEALTH
from service.settings import Settings

BURST_SECONDS = 1
# Buckets that are full again are forgotten once there are so many.
MANY_BUCKETS = 1000

Key = tuple[str, str]  # who calls what


class Limits(Around):
    """Bounds calls in flight and calls a second by caller and method, and calls in flight in all.

    A caller's own limit is QuotaExceeded or RateLimited, the server's is Overloaded; nothing was done.
    A stream whose client sends nothing for too long is QuotaExceeded. One whose client does not read keeps
    its place instead: gRPC sends no status past messages that wait. Health is never refused.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._settings = settings
        self._now = now
        self._streams: set[str] = set()
        self._uploads: set[str] = set()
        self._in_flight: Counter[Key] = Counter()
        self._calls = 0
        self._spent_until: dict[Key, float] = {}

    def wrap(self, method: str, handler: Any) -> Any:
        if method in HEALTH:
            return handler
        if handler.request_streaming or handler.response_streaming:
            self._streams.add(method)
        if handler.request_streaming:
            self._uploads.add(method)
        return super().wrap(method, handler)

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        key = current_caller().identity, method
        self._admit(key)
        self._calls += 1
        self._in_flight[key] += 1
        try:
            return await proceed(self._patient(request) if method in self._uploads else request, context)
        finally:
            self._calls -= 1
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]

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

    def _admit(self, key: Key) -> None:
        if self._calls >= self._settings.max_calls:
            raise Overloaded("the server has too many calls in flight; nothing was done, try again")
        is_stream = key[1] in self._streams
        most = self._settings.caller_streams if is_stream else self._settings.caller_calls
        if self._in_flight[key] >= most:
            raise QuotaExceeded(
                f"{most} calls of this method are in flight already; wait until some have ended"
            )
        self._spend(key)

    def _spend(self, key: Key) -> None:
        """Take a token: the bucket is kept as the time at which it is full again (GCRA)."""
        now, rate = self._now(), self._settings.caller_rate
        if len(self._spent_until) >= MANY_BUCKETS:
            self._spent_until = {key: until for key, until in self._spent_until.items() if until > now}
        until = max(self._spent_until.get(key, now), now)
        if until - now >= BURST_SECONDS:
            raise RateLimited(f"this method was called more than {rate} times a second; slow down")
        self._spent_until[key] = until + 1 / rate
