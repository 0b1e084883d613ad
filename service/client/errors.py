"""Status -> domain error: the way back of `status.py`."""

from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from service.errors import OutcomeUnknown, RosterError, Unavailable, error_of


class Disconnected(Unavailable):
    """No server answers, or the call broke on its way, before anybody could give a reason."""

    reason = "DISCONNECTED"
    retry_after_seconds = 0.0


class DeadlineExceeded(RosterError):
    """No answer came in time; a write may have happened, and its request_id makes it safe to repeat."""

    reason = "DEADLINE_EXCEEDED"


# Of statuses that no server of Roster has sent.
WITHOUT_REASON: Mapping[int, type[RosterError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0]: DeadlineExceeded,
    **{
        code.value[0]: Disconnected
        for code in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        )
    },
}


def error_from_call(error: grpc.aio.AioRpcError) -> RosterError:
    """Return what a failed call means."""
    return error_from_status(status_of(error.code(), error.details(), error.trailing_metadata()))


def error_from_status(status: Status) -> RosterError:
    """Return what a status means; an error of this release where its reason is known to it."""
    info, bad, retry = (_detail(status, kind) for kind in (ErrorInfo, BadRequest, RetryInfo))
    error = (
        _with_reason(status, info, bad) if info else WITHOUT_REASON.get(status.code, _Other)(status.message)
    )
    if info or retry:
        error.retry_after_seconds = retry.retry_delay.ToMilliseconds() / 1000 if retry else None
    return error


def may_pass(error: RosterError) -> bool:
    """Tell whether it makes sense to try again."""
    return isinstance(error, Unavailable | OutcomeUnknown) or error.retry_after_seconds is not None


def status_of(code: grpc.StatusCode, message: str | None, metadata: Any) -> Status:
    """Return the status of a call, with the details that it came with."""
    details = dict(metadata or ()).get("grpc-status-details-bin")
    if isinstance(details, bytes):
        return Status.FromString(details)
    return Status(code=code.value[0], message=message)


class _Other(RosterError):
    """A status that nobody here has a name for."""


def _with_reason(status: Status, info: ErrorInfo, bad: BadRequest | None) -> RosterError:
    field = bad.field_violations[0].field if bad and bad.field_violations else ""
    facts = {name: int(fact) if fact.isdecimal() else fact for name, fact in info.metadata.items()}
    try:
        return error_of(info.reason, status.message, field, facts)
    except KeyError:
        error = _Other(status.message, field=field, **facts)
        error.reason = info.reason
        return error


def _detail(status: Status, kind: type[Any]) -> Any:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
