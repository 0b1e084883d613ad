"""Call metrics: calls started, ended by code, and in flight, and their duration."""

from collections import Counter
from collections.abc import Callable

import grpc

from service.interceptors.chain import Rpc
from service.metrics import CALLS, HANDLED, HANDLING, STARTED

# Named as in go-grpc-middleware, like the metrics.
CODE_NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


class CallMetrics:
    """The metrics of one RPC's calls, changed once for all calls of an iteration of the event loop.

    `do_later` runs a function at the end of the iteration.
    """

    def __init__(self, rpc: Rpc, do_later: Callable[[Callable[[], None]], None]) -> None:
        labels = _grpc_type(rpc), rpc.service, rpc.name
        # A look-up by labels takes longer than the increment, so it is done once.
        self._started = STARTED.labels(*labels)
        self._in_flight = CALLS.labels(*labels)
        self._seconds = HANDLING.labels(*labels)
        self._handled = {code: HANDLED.labels(*labels, name) for code, name in CODE_NAMES.items()}
        self._do_later = do_later
        self._is_due = False
        self._begun = 0
        self._ended: list[tuple[grpc.StatusCode, float]] = []

    def begin(self) -> None:
        """Count a call that has started."""
        self._begun += 1
        self._update_later()

    def end(self, code: grpc.StatusCode, seconds: float) -> None:
        """Count a call that has ended, with its duration."""
        self._ended.append((code, seconds))
        self._update_later()

    def _update_later(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._do_later(self._update)

    def _update(self) -> None:
        begun, self._begun = self._begun, 0
        ended, self._ended = self._ended, []
        self._is_due = False
        self._started.inc(begun)
        self._in_flight.inc(begun - len(ended))
        for _, seconds in ended:
            self._seconds.observe(seconds)
        for code, count in Counter(code for code, _ in ended).items():
            self._handled[code].inc(count)


def _grpc_type(rpc: Rpc) -> str:
    if rpc.is_upload:
        return "bidi_stream" if rpc.is_download else "client_stream"
    return "server_stream" if rpc.is_download else "unary"
