"""Call metrics: calls started, ended by code, and in flight, and their duration."""

from time import perf_counter

import grpc

from service.interceptors.chain import Context, Proceed, Request, Response, Rpc, code_at_end
from service.metrics import CALLS, HANDLED, HANDLING, STARTED

# Named as in go-grpc-middleware, like the metrics.
CODE_NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


def measure_calls(rpc: Rpc, proceed: Proceed) -> Proceed:
    """Count and time every call. It wraps `answer_errors`, which sets the code of a call."""
    labels = _grpc_type(rpc), rpc.service, rpc.name
    # A look-up by labels takes longer than the increment, so it is done once.
    started = STARTED.labels(*labels)
    in_flight = CALLS.labels(*labels)
    seconds = HANDLING.labels(*labels)
    handled = {code: HANDLED.labels(*labels, name) for code, name in CODE_NAMES.items()}

    async def measure(request: Request, context: Context) -> Response:
        started.inc()
        in_flight.inc()
        began = perf_counter()
        try:
            return await proceed(request, context)
        finally:
            in_flight.dec()
            seconds.observe(perf_counter() - began)
            handled[code_at_end(context)].inc()

    return measure


def _grpc_type(rpc: Rpc) -> str:
    if rpc.is_upload:
        return "bidi_stream" if rpc.is_download else "client_stream"
    return "server_stream" if rpc.is_download else "unary"
