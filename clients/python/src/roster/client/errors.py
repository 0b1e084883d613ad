"""Converts a status to a domain error: the inverse of the server's mapping."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from roster.client.causes import explain
from roster.errors import (
    OutcomeUnknown,
    PermissionDenied,
    RosterError,
    Unauthenticated,
    Unavailable,
    Unsupported,
    error_of,
)
from roster.errors.codes import BASES

DetailT = TypeVar("DetailT", bound=Message)

NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")  # among the facts, which are texts on the wire


class Disconnected(Unavailable):
    """No server was reached, or the connection broke before the server gave a reason."""

    reason = "DISCONNECTED"
    retry_after_seconds = 0.0


class ProxyUnavailable(Disconnected):
    """A proxy answered instead of the server; a later call may reach the server."""


class ProxyRefused(RosterError):
    """A proxy answered instead of the server, or ended the call; repeating it does not help."""

    reason = "PROXY_REFUSED"


class DeadlineExceeded(RosterError):
    """The call timed out. A write may have been applied; its request_id makes it safe to repeat."""

    reason = "DEADLINE_EXCEEDED"


class UnknownError(RosterError):
    """An error whose status code says no more than that, such as a message that exceeds a limit of gRPC."""


# For statuses without ErrorInfo, which come from gRPC itself or from a proxy.
WITHOUT_REASON: Mapping[int, type[RosterError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0]: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE.value[0]: Disconnected,
    grpc.StatusCode.CANCELLED.value[0]: Disconnected,
    grpc.StatusCode.INTERNAL.value[0]: Disconnected,
    grpc.StatusCode.UNKNOWN.value[0]: Disconnected,
    grpc.StatusCode.UNIMPLEMENTED.value[0]: Unsupported,
    grpc.StatusCode.UNAUTHENTICATED.value[0]: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED.value[0]: PermissionDenied,
}

# gRPC's own texts for an answer without grpc-status: with another HTTP status than 200, and with a body only.
HTTP_STATUS = re.compile(r"Received http2 header with status: (\d{3})")
BODY_ONLY = "Data frame with END_STREAM flag received"
# 429, 502, 503 and 504 are UNAVAILABLE in https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md.
# 408 is a timeout, 520 to 524 are Cloudflare's for a server that it can't reach.
TEMPORARY = {408, 429, 502, 503, 504, *range(520, 525)}
BODY_SIZE = (
    "a load is one long request: turn off the limit of the proxy for request bodies "
    "(nginx: client_max_body_size 0)"
)
CREDENTIALS = "the proxy must admit gRPC calls, or the call needs credentials for it"
ROUTE = "the proxy needs a route for the paths /roster.v1.*, and HTTP/2 to the server (nginx: grpc_pass)"
REDIRECT = "the proxy redirects calls, for example to a login page; it must pass gRPC calls to the server"
ADVICE = {
    **dict.fromkeys((301, 302, 303, 307, 308), REDIRECT),
    **dict.fromkeys((401, 403, 407), CREDENTIALS),
    **dict.fromkeys((400, 404, 405, 415, 426, 464, 501, 505), ROUTE),
    **dict.fromkeys((411, 413), BODY_SIZE),
}


class FailedCall(Protocol):
    """The error of a call, from grpc or from grpc.aio."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def error_from_call(failure: FailedCall, address: str = "") -> RosterError:
    """Return the domain error of a failed call to an address, "" if it is not known."""
    status = status_from_call(failure.code(), failure.details(), failure.trailing_metadata())
    return error_from_status(status, address)


def error_from_status(status: Status, address: str = "") -> RosterError:
    """Return the domain error of a status: the class of its reason, or UnknownError."""
    info = _detail(status, ErrorInfo)
    retry = _detail(status, RetryInfo)
    if info:
        error = _error_from_info(status, info)
    elif from_proxy := _error_from_proxy(status.message):
        error = from_proxy
    else:
        error = _error_without_reason(status, address)
    # The details decide whether to retry; without any, the default of the class does.
    if retry:
        error.retry_after_seconds = retry.retry_delay.ToMilliseconds() / 1000
    elif info:
        error.retry_after_seconds = None
    return error


def is_retryable(error: RosterError) -> bool:
    """Return whether repeating the call can succeed."""
    return isinstance(error, Unavailable | OutcomeUnknown) or error.retry_after_seconds is not None


def status_from_call(code: grpc.StatusCode, message: str | None, metadata: Any) -> Status:
    """Return the status of a call, with its details."""
    details = dict(metadata or ()).get("grpc-status-details-bin")
    if isinstance(details, bytes):
        return Status.FromString(details)
    return Status(code=code.value[0], message=message)


def status_of_ended_call(call: grpc.aio.Call) -> Status:
    """Return the status of a call that has ended, as it is at this moment.

    grpc.aio offers the status through coroutines only, and may replace it between two iterations of the event
    loop (grpc#36066). Once the call has ended, they never suspend, so a single step returns their result.
    """
    try:
        _read_status(call).send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the call has not ended")


async def _read_status(call: grpc.aio.Call) -> Status:
    return status_from_call(await call.code(), await call.details(), await call.trailing_metadata())


def _error_from_proxy(message: str) -> RosterError | None:
    """Return the error for an answer that is HTTP but not gRPC; None for any other message."""
    found = HTTP_STATUS.search(message)
    if not found:
        # gRPC sometimes loses the HTTP status, so this can be a temporary one.
        is_body = BODY_ONLY in message
        return ProxyUnavailable(f"something that is not a gRPC server answered; {ROUTE}") if is_body else None
    number = int(found[1])
    answer = f"a proxy answered with HTTP {number}{_phrase(number)} instead of the server"
    if number in TEMPORARY:
        return ProxyUnavailable(answer)
    advice = ADVICE.get(number)
    return ProxyRefused(f"{answer}; {advice}" if advice else answer)


def _phrase(number: int) -> str:
    try:
        return f" ({HTTPStatus(number).phrase})"
    except ValueError:
        return ""


def _error_without_reason(status: Status, address: str) -> RosterError:
    message = explain(status.message, address) or status.message
    if status.code == grpc.StatusCode.UNIMPLEMENTED.value[0]:
        message = f"the server does not know this RPC; is it of an earlier release? ({message})"
    return WITHOUT_REASON.get(status.code, UnknownError)(message)


def _error_from_info(status: Status, info: ErrorInfo) -> RosterError:
    bad_request = _detail(status, BadRequest)
    field = ""
    if bad_request and bad_request.field_violations:
        field = bad_request.field_violations[0].field
    facts = {name: _fact(text) for name, text in info.metadata.items()}
    try:
        return error_of(info.reason, status.message, field, facts)
    except KeyError:  # of a later release
        error = BASES.get(status.code, UnknownError)(status.message, field=field)
        error.reason, error.facts = info.reason, facts
        return error


def _fact(text: str) -> int | str:
    return int(text) if NUMBER.fullmatch(text) else text


def _detail(status: Status, kind: type[DetailT]) -> DetailT | None:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
