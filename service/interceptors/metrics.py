"""Calls by method and code, how long they took, and how many there are now."""

from time import perf_counter
from typing import Any

import grpc

from service.interceptors.around import Around, Context, Proceed, code_at_end, kind
from service.metrics import CALLS, HANDLED, HANDLING, STARTED

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
    """The metrics of one method: to look a label up takes longer than to count."""

    def __init__(self, method: str, handler: Any) -> None:
        _, service, name = method.split("/")
        self._labels = (TYPES[kind(handler)], service, name)
        self.started = STARTED.labels(*self._labels)
        self.handling = HANDLING.labels(*self._labels)
        self.in_flight = CALLS.labels(*self._labels)
        self.handled = {code: HANDLED.labels(*self._labels, name) for code, name in NAMES.items()}


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
        metrics.started.inc()
        metrics.in_flight.inc()
        began = perf_counter()
        try:
            return await proceed(request, context)
        finally:
            metrics.handling.observe(perf_counter() - began)
            metrics.in_flight.dec()
            metrics.handled[code_at_end(context)].inc()
