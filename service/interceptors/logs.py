"""One line in the log for every call; the lines written meanwhile carry its ids."""

import logging
import re
from collections.abc import Sequence
from random import getrandbits
from time import perf_counter
from typing import Any

from service.auth.caller import current_caller
from service.db.statements import LISTENERS
from service.interceptors.chain import Around, Context, Proceed, code_at_end
from service.logs import CALL
from service.turns import Turn

log = logging.getLogger("service.calls")

# As HTTP/2 carries text in gRPC; no raw byte of a header reaches the log.
REQUEST_ID = re.compile(r"[ -~]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")
QUIET = "/grpc.health.v1.Health/"  # probes come every few seconds


class Statements:
    """How many statements a call had, and what they took together."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, _: str, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


class Logs(Around):
    """Logs each call when it has ended, never what was in it; as a warning where it was slow.

    The request id is the caller's `x-request-id`, 1 to 128 printable ASCII characters, otherwise a new one;
    the trace id is that of `traceparent`.
    """

    def __init__(self, slow_seconds: float) -> None:
        super().__init__()
        self._slow_seconds = slow_seconds
        self._streams: set[str] = set()
        self._ended = Turn(_write)

    def wrap(self, method: str, handler: Any) -> Any:
        if handler.request_streaming or handler.response_streaming:
            self._streams.add(method)
        return super().wrap(method, handler)

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        # Each call is a task with a context of its own, so nothing is put back.
        CALL.set(_ids(context))
        statements = Statements()
        LISTENERS.set((*LISTENERS.get(), statements.add))
        began = perf_counter()
        try:
            return await proceed(request, context)
        finally:
            seconds = perf_counter() - began
            if log.isEnabledFor(level := self._level(method, seconds)):
                fields = {
                    **CALL.get(),
                    "method": method,
                    "code": code_at_end(context).name,
                    "seconds": round(seconds, 6),
                    "statements": statements.count,
                    "statement_seconds": round(statements.seconds, 6),
                    "caller": current_caller().identity,
                    "peer": context.peer(),
                }
                self._ended.add((level, fields))

    def _level(self, method: str, seconds: float) -> int:
        if method.startswith(QUIET):
            return logging.DEBUG
        # A stream lasts as long as its client wants.
        is_slow = seconds > self._slow_seconds and method not in self._streams
        return logging.WARNING if is_slow else logging.INFO


def _write(calls: Sequence[tuple[int, dict[str, Any]]]) -> None:
    for level, fields in calls:
        log.log(level, "call", extra={"fields": fields})


def _ids(context: Context) -> dict[str, str]:
    metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
    request_id = metadata.get("x-request-id", "")
    # Nobody gains by guessing one, and uuid4 asks the system for each: 8 µs.
    ids = {"request_id": request_id if REQUEST_ID.fullmatch(request_id) else f"{getrandbits(128):032x}"}
    # https://www.w3.org/TR/trace-context/#traceparent-header
    if trace := TRACEPARENT.fullmatch(metadata.get("traceparent", "")):
        ids["trace_id"] = trace[1]
    return {**ids, **CALL.get()}
