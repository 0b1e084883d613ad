"""Limits calls in flight and call rates, per caller and method and in total, against runaway clients."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from roster.errors import Overloaded, QuotaExceeded, RateLimited, RosterError
from service.auth.caller import current_share
from service.auth.policy import HEALTH
from service.interceptors.chain import Context, Proceed, Response, Rpc
from service.settings import Settings
from service.shares import FairSemaphore

BURST_SECONDS = 1
# Idle callers are evicted above this many entries.
MAX_IDLE_USES = 1000

CallerAndPath = tuple[str, str]


@dataclass(slots=True)
class Use:
    """One caller's use of one RPC: calls in flight, and the time until which its rate is used up (GCRA)."""

    in_flight: int = 0
    spent_until: float = 0.0


class UntilIdle:
    """An iterator over the messages of an upload; raises QuotaExceeded if none arrives for some seconds.

    It keeps no message, unlike a generator, which keeps the last one until the next one arrives.
    """

    def __init__(self, requests: AsyncIterator[bytes], seconds: float) -> None:
        self._requests = requests
        self._seconds = seconds

    def __aiter__(self) -> "UntilIdle":
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                return await anext(self._requests)
        except TimeoutError:
            idle = f"nothing was sent for {self._seconds:g} s; open another stream"
            raise QuotaExceeded(idle) from None


class Limits:
    """Refuses calls above the limits of a caller or of the server, before they do anything.

    Above a caller's own limits the error is QuotaExceeded or RateLimited, above the server's Overloaded. A
    caller may have its fair share of all calls in flight, whatever the RPCs, and of all watches. Watches
    don't count as calls in flight: they last for days, and cost little. A stream whose client sends
    nothing for too long ends with QuotaExceeded. One whose client does not read can't be ended: gRPC sends
    the status only after the messages that wait to be read. Health checks are never refused.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._now = now
        self._calls = FairSemaphore(settings.max_calls)
        self._watches = FairSemaphore(settings.max_watchers)
        self._uses: dict[CallerAndPath, Use] = {}

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Apply the limits to the calls of an RPC."""
        if rpc.path in HEALTH:
            return proceed
        slots = self._watches if rpc.is_watch else self._calls
        max_in_flight = self._max_in_flight(rpc)

        async def limit(request: Any, context: Context) -> Response:
            caller = current_share()
            use = self._use((caller, rpc.path))
            self._admit(use, max_in_flight)
            if not slots.try_acquire(caller):
                raise _refusal(slots, caller, "watches" if rpc.is_watch else "calls")
            use.in_flight += 1
            if rpc.is_upload:
                request = UntilIdle(request, self._settings.stream_idle_timeout)
            try:
                return await proceed(request, context)
            finally:
                slots.release(caller)
                use.in_flight -= 1

        return limit

    def _max_in_flight(self, rpc: Rpc) -> int:
        """Return how many calls of an RPC one caller may have in flight."""
        if rpc.is_watch:
            return self._settings.max_watchers + 1  # a caller's share of the watches is its limit
        return self._settings.caller_streams if rpc.is_stream else self._settings.caller_calls

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


def _refusal(slots: FairSemaphore, caller: str, calls: str) -> RosterError:
    """Return the error for a call without a slot; `calls` is what has the slots."""
    if slots.free:
        return QuotaExceeded(
            f"this caller has {slots.held(caller)} {calls} in flight, which is its share of {slots.size}; "
            "try again when some have ended"
        )
    return Overloaded(f"the server has too many {calls} in flight; nothing was done, try again")
