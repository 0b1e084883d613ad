"""The status code of each domain error: the only table of them. The errors themselves need no gRPC."""

from functools import cache

import grpc

from roster import errors
from roster.errors import RosterError

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
# The number of a status code -> the class of the errors that have it.
BASES = {code.value[0]: kind for kind, code in STATUS.items() if kind is not RosterError}
# The numbers of status codes, as gRPC sends them, -> Python's enumeration.
CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_code(error: RosterError) -> grpc.StatusCode:
    """Return the status code of a domain error; the most specific entry of the table wins."""
    return _status_code(type(error))  # type: ignore[arg-type]  # a type is hashable


@cache
def _status_code(kind: type[RosterError]) -> grpc.StatusCode:
    return next(STATUS[base] for base in kind.__mro__ if base in STATUS)
