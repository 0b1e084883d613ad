"""Calls by method and code, how long they took, and how many there are now."""

from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import grpc

from service.interceptors.chain import Around, Context, Proceed, code_at_end, kind
from service.metrics import CALLS, HANDLED, HANDLING, STARTED
from service.turns import Turn

# As Go has them, like the metrics' names.
TYPES = {
    "unary_unary": "unary",
    "unary_stream": "server_stream",
    "stream_unary": "client_stream",
    "stream_stream": "bidi_stream",
}
NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


class _Method:
    """The metrics of one method, brought up to date once a turn of the event loop.

    With 64 calls in flight that is 10 µs less a call on PostgreSQL, and no less on SQLite.
    """

    def __init__(self, method: str, handler: Any) -> None:
        _, service, name = method.split("/")
        labels = TYPES[kind(handler)], service, name
        self._started = STARTED.labels(*labels)
        self._handling = HANDLING.labels(*labels)
        self._in_flight = CALLS.labels(*labels)
        self._handled = {code: HANDLED.labels(*labels, name) for code, name in NAMES.items()}
        self.begun = Turn(self._begin)
        self.ended = Turn(self._end)

    def _begin(self, calls: Sequence[None]) -> None:
        self._started.inc(len(calls))
        self._in_flight.inc(len(calls))

    def _end(self, calls: Sequence[tuple[grpc.StatusCode, float]]) -> None:
        self._in_flight.dec(len(calls))
        for code, count in Counter(code for code, _ in calls).items():
            self._handled[code].inc(count)
        for _, seconds in calls:
            self._handling.observe(seconds)


class Metrics(Around):
    """Counts and measures every call; it stands outside the one that gives errors their codes."""

    def __init__(self) -> None:
        super().__init__()
        self._methods: dict[str, _Method] = {}

    def wrap(self, method: str, handler: Any) -> Any:
        self._methods[method] = _Method(method, handler)
        return super().wrap(method, handler)

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        metrics = self._methods[method]
        metrics.begun.add(None)
        began = perf_counter()
        try:
            return await proceed(request, context)
        finally:
            metrics.ended.add((code_at_end(context), perf_counter() - began))
