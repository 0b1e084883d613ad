"""Limits calls in flight and call rates, per caller and method and in total, against runaway clients."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from service.auth.caller import current_share
from service.auth.policy import HEALTH
from service.errors import Overloaded, QuotaExceeded, RateLimited, RosterError
from service.interceptors.chain import Context, Proceed, Response, Rpc
from service.settings import Settings
from service.shares import FairSemaphore

BURST_SECONDS = 1
# Idle callers are evicted above this many entries.
MAX_IDLE_USES = 1000

CallerAndPath = tuple[str, str]
RequestT = TypeVar("RequestT")


@dataclass(slots=True)
class Use:
    """One caller's use of one RPC: calls in flight, and the time until which its rate is used up (GCRA)."""

    in_flight: int = 0
    spent_until: float = 0.0


class Limits:
    """Refuses calls above the limits of a caller or of the server, before they do anything.

    Above a caller's own limits the error is QuotaExceeded or RateLimited, above the server's Overloaded. A
    caller may have its fair share of all calls in flight, whatever the RPCs. A stream whose client sends
    nothing for too long ends with QuotaExceeded. One whose client does not read can't be ended: gRPC sends
    the status only after the messages that wait to be read. Health checks are never refused.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._now = now
        self._calls = FairSemaphore(settings.max_calls)
        self._uses: dict[CallerAndPath, Use] = {}

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Apply the limits to the calls of an RPC."""
        if rpc.path in HEALTH:
            return proceed
        max_in_flight = self._settings.caller_streams if rpc.is_stream else self._settings.caller_calls

        async def limit(request: Any, context: Context) -> Response:
            caller = current_share()
            use = self._use((caller, rpc.path))
            self._admit(use, max_in_flight)
            if not self._calls.try_acquire(caller):
                raise self._refusal(caller)
            use.in_flight += 1
            if rpc.is_upload:
                request = self._end_when_idle(request)
            try:
                return await proceed(request, context)
            finally:
                self._calls.release(caller)
                use.in_flight -= 1

        return limit

    async def _end_when_idle(self, requests: AsyncIterator[RequestT]) -> AsyncIterator[RequestT]:
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

    def _use(self, key: CallerAndPath) -> Use:
        use = self._uses.get(key)
        if use is None:
            if len(self._uses) >= MAX_IDLE_USES:
                self._evict_idle()
            use = self._uses[key] = Use()
        return use

    def _evict_idle(self) -> None:
        now = self._now()
        self._uses = {key: use for key, use in self._uses.items() if use.in_flight or use.spent_until > now}

    def _admit(self, use: Use, max_in_flight: int) -> None:
        if use.in_flight >= max_in_flight:
            raise QuotaExceeded(
                f"{max_in_flight} calls of this method are in flight already; try again when some have ended"
            )
        now, rate = self._now(), self._settings.caller_rate
        spent_until = max(use.spent_until, now)
        if spent_until - now >= BURST_SECONDS:
            raise RateLimited(f"this method was called more than {rate} times a second; slow down")
        use.spent_until = spent_until + 1 / rate

    def _refusal(self, caller: str) -> RosterError:
        if self._calls.free:
            return QuotaExceeded(
                f"this caller has {self._calls.held(caller)} calls in flight, which is its share of "
                f"{self._calls.size}; try again when some have ended"
            )
        return Overloaded("the server has too many calls in flight; nothing was done, try again")
