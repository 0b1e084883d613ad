"""Converts domain errors to google.rpc.Status, with the only table of status codes.

`error_from_status` of `roster.client.errors` is the inverse.
"""

from functools import cache

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from roster import errors
from roster.errors import RosterError

DOMAIN = "roster"
# gRPC limits metadata to 16 KiB, which includes the message and the overhead of base64.
MAX_VIOLATIONS = 50
MAX_VIOLATION_BYTES = 6000

STATUS: dict[type[RosterError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.StatementTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    RosterError: grpc.StatusCode.INTERNAL,
}
# The numbers of status codes, as gRPC sends them, -> Python's enumeration.
CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_code(error: RosterError) -> grpc.StatusCode:
    """Return the status code of a domain error; the most specific entry of the table wins."""
    return _status_code(type(error))  # type: ignore[arg-type]  # a type is hashable


@cache
def _status_code(kind: type[RosterError]) -> grpc.StatusCode:
    return next(STATUS[base] for base in kind.__mro__ if base in STATUS)


def status_from_error(error: RosterError) -> Status:
    """Return the status of an error, with ErrorInfo, and with BadRequest or RetryInfo if they apply."""
    facts = {name: str(value) for name, value in error.facts.items()}
    details: list[Message] = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts)]
    if isinstance(error, errors.InvalidArgument) and error.violations:
        details.append(_bad_request(error))
    if error.retry_after_seconds is not None:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        details.append(retry)
    status = Status(code=status_code(error).value[0], message=error.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _bad_request(error: RosterError) -> BadRequest:
    """Return as many violations as fit into the trailing metadata."""
    bad, bytes_left = BadRequest(), MAX_VIOLATION_BYTES
    for violation in error.violations[:MAX_VIOLATIONS]:
        bytes_left -= len(violation.field) + len(violation.message.encode())
        if bytes_left < 0:
            break
        bad.field_violations.add(field=violation.field, description=violation.message)
    return bad
