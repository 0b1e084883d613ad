"""Call metrics: calls started, ended by code, and in flight, and their duration."""

import grpc

from service.interceptors.chain import Rpc
from service.metrics import CALLS, HANDLED, HANDLING, STARTED

# Named as in go-grpc-middleware, like the metrics.
CODE_NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


class CallMetrics:
    """The metrics of one RPC's calls."""

    def __init__(self, rpc: Rpc) -> None:
        labels = _grpc_type(rpc), rpc.service, rpc.name
        # A look-up by labels takes longer than the increment, so it is done once.
        self._started = STARTED.labels(*labels)
        self._in_flight = CALLS.labels(*labels)
        self._seconds = HANDLING.labels(*labels)
        self._handled = {code: HANDLED.labels(*labels, name) for code, name in CODE_NAMES.items()}

    def begin(self) -> None:
        """Count a call that has started."""
        self._started.inc()
        self._in_flight.inc()

    def end(self, code: grpc.StatusCode, seconds: float) -> None:
        """Count a call that has ended, with its duration."""
        self._in_flight.dec()
        self._seconds.observe(seconds)
        self._handled[code].inc()


def _grpc_type(rpc: Rpc) -> str:
    if rpc.is_upload:
        return "bidi_stream" if rpc.is_download else "client_stream"
    return "server_stream" if rpc.is_download else "unary"
