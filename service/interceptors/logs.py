"""Writes one log line for each call, and gives the other lines of the call its ids."""

import logging
import re
import time
from collections.abc import Mapping
from random import getrandbits
from typing import Any

import grpc

from service.auth.policy import HEALTH
from service.db.statements import LISTENERS
from service.interceptors.chain import Context, Rpc
from service.logs import CALL_IDS

log = logging.getLogger("service.calls")

# Printable ASCII, as gRPC allows in text headers; raw bytes of a header never reach the log.
REQUEST_ID = re.compile(r"[ -~]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")
REFLECTION = "grpc.reflection."


class CallRecord(logging.LogRecord):
    """The record of a call, a copy of an empty one: a new one takes as long as the rest of a line."""

    def __init__(self, level: int, fields: Mapping[str, Any]) -> None:
        created = time.time()
        self.__dict__ = {
            **EMPTY,
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "created": created,
            "msecs": created % 1 * 1000,
            "fields": fields,
        }


EMPTY = logging.LogRecord(log.name, 0, "", 0, "call", (), None).__dict__


class StatementTotals:
    """The number of statements of a call, and the seconds that they took."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, _: str, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


class CallLog:
    """Logs the calls of one RPC when they have ended, as warnings if they were slow.

    A line contains nothing of the request or the response. The request id is the caller's `x-request-id` if
    it has 1 to 128 printable ASCII characters, otherwise a random one. The trace id is that of `traceparent`.
    """

    def __init__(self, rpc: Rpc, slow_seconds: float) -> None:
        self._path = rpc.path
        # Probes come every few seconds, and grpcurl asks for reflection before each call.
        is_incidental = rpc.path in HEALTH or rpc.service.startswith(REFLECTION)
        self._level = logging.DEBUG if is_incidental else logging.INFO
        # A stream lasts as long as its client wants.
        can_be_slow = rpc.path not in HEALTH and not rpc.is_stream
        self._slow_seconds = slow_seconds if can_be_slow else float("inf")

    def begin(self, context: Context) -> StatementTotals:
        """Give the lines and the statements of this call its ids and its totals, which are returned."""
        # Each call is a task with a context of its own, so nothing has to be reset.
        CALL_IDS.set(_ids(context))
        statements = StatementTotals()
        LISTENERS.set((*LISTENERS.get(), statements.add))
        return statements

    def end(
        self,
        code: grpc.StatusCode,
        seconds: float,
        statements: StatementTotals,
        ids: Mapping[str, str],
        caller: str,
        peer: str,
    ) -> None:
        """Log a call that has ended; it needs nothing of the call's context, which may have ended too."""
        level = logging.WARNING if seconds > self._slow_seconds else self._level
        if log.isEnabledFor(level):
            fields = {
                **ids,
                "method": self._path,
                "code": code.name,
                "seconds": round(seconds, 6),
                "statements": statements.count,
                "statement_seconds": round(statements.seconds, 6),
                "caller": caller,
                "peer": peer,
            }
            log.handle(CallRecord(level, fields))


def _ids(context: Context) -> Mapping[str, str]:
    metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
    request_id = metadata.get("x-request-id")
    if request_id is None or not REQUEST_ID.fullmatch(request_id):
        # It needs no secrecy, and uuid4 takes 8 µs, because it reads random bytes from the system each time.
        request_id = f"{getrandbits(128):032x}"
    ids = {"request_id": request_id}
    traceparent = metadata.get("traceparent")
    if traceparent and (trace := TRACEPARENT.fullmatch(traceparent)):
        ids["trace_id"] = trace[1]
    return {**ids, **CALL_IDS.get()}
