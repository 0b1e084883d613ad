"""Writes one log line for each call, and gives the other lines of the call its ids."""

import logging
import re
from random import getrandbits
from time import perf_counter
from typing import Any

from service.auth.caller import current_caller
from service.auth.policy import HEALTH
from service.db.statements import LISTENERS
from service.interceptors.chain import Context, Interceptor, Proceed, Request, Response, Rpc, code_at_end
from service.logs import CALL_IDS

log = logging.getLogger("service.calls")

# Printable ASCII, as gRPC allows in text headers; raw bytes of a header never reach the log.
REQUEST_ID = re.compile(r"[ -~]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


REFLECTION = "grpc.reflection."


class StatementTotals:
    """The number of statements of a call, and the seconds that they took."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, _: str, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


def log_calls(slow_seconds: float) -> Interceptor:
    """Return an interceptor that logs each call when it has ended, as a warning if it was slow.

    A line contains nothing of the request or the response. The request id is the caller's `x-request-id` if
    it has 1 to 128 printable ASCII characters, otherwise a random one. The trace id is that of `traceparent`.
    """

    def intercept(rpc: Rpc, proceed: Proceed) -> Proceed:
        # Probes come every few seconds, and grpcurl asks for reflection before each call.
        is_incidental = rpc.path in HEALTH or rpc.service.startswith(REFLECTION)
        normal_level = logging.DEBUG if is_incidental else logging.INFO
        # A stream lasts as long as its client wants.
        can_be_slow = rpc.path not in HEALTH and not rpc.is_stream

        async def log_call(request: Request, context: Context) -> Response:
            # Each call is a task with a context of its own, so nothing has to be reset.
            ids = _ids(context)
            CALL_IDS.set(ids)
            statements = StatementTotals()
            LISTENERS.set((*LISTENERS.get(), statements.add))
            began = perf_counter()
            try:
                return await proceed(request, context)
            finally:
                seconds = perf_counter() - began
                is_slow = can_be_slow and seconds > slow_seconds
                level = logging.WARNING if is_slow else normal_level
                if log.isEnabledFor(level):
                    fields = {
                        **ids,
                        "method": rpc.path,
                        "code": code_at_end(context).name,
                        "seconds": round(seconds, 6),
                        "statements": statements.count,
                        "statement_seconds": round(statements.seconds, 6),
                        "caller": current_caller().identity,
                        "peer": context.peer(),
                    }
                    log.log(level, "call", extra={"fields": fields})

        return log_call

    return intercept


def _ids(context: Context) -> dict[str, str]:
    metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
    request_id = metadata.get("x-request-id", "")
    if not REQUEST_ID.fullmatch(request_id):
        # It needs no secrecy, and uuid4 takes 8 µs, because it reads random bytes from the system each time.
        request_id = f"{getrandbits(128):032x}"
    ids = {"request_id": request_id}
    # https://www.w3.org/TR/trace-context/#traceparent-header
    if trace := TRACEPARENT.fullmatch(metadata.get("traceparent", "")):
        ids["trace_id"] = trace[1]
    return {**ids, **CALL_IDS.get()}
