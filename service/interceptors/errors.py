"""From domain error to status: the one table, and the repairs of what grpc.aio does by itself."""

import asyncio
import logging
from functools import cache
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from service import errors
from service.errors import RosterError
from service.interceptors.chain import CODES, Around, Context, Proceed

log = logging.getLogger(__name__)

DOMAIN = "roster"
# Metadata has a hard limit of 16 KiB, base64 and the message included.
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
    RosterError: grpc.StatusCode.INTERNAL,
}


def status_code(error: RosterError) -> grpc.StatusCode:
    """Return the status of a domain error; the most specific entry of the table wins."""
    return _status_code(type(error))  # type: ignore[arg-type]  # a type is hashable


@cache
def _status_code(kind: type[RosterError]) -> grpc.StatusCode:
    return next(STATUS[base] for base in kind.__mro__ if base in STATUS)


def status_from_error(error: RosterError) -> Status:
    """Return an error as google.rpc.Status: ErrorInfo, and BadRequest or RetryInfo where they apply."""
    facts = {name: str(value) for name, value in error.facts.items()}
    details: list[Message] = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts)]
    if isinstance(error, errors.InvalidArgument) and error.violations:
        details.append(_bad_request(error))
    if error.retry_after_seconds is not None:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        details.append(retry)
    return Status(
        code=status_code(error).value[0], message=error.message, details=[_packed(d) for d in details]
    )


class Errors(Around):
    """The outermost interceptor: a caller gets a status with details, or an opaque INTERNAL."""

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        try:
            return await proceed(request, context)
        except RosterError as error:
            status = status_from_error(error)
        except grpc.aio.AbortError:  # health's own answer
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this call. Without a status the caller would wait for its deadline.
            log.exception("%s was cut off by a cancellation inside", method)
            status = _opaque()
        except Exception:
            log.exception("%s failed", method)
            status = _opaque()
        # Not inside `except`: the context keeps what `abort` raises, that would keep the error, and its
        # traceback the request, until the garbage collector finds the circle.
        return await _abort(context, status)


async def _abort(context: Context, status: Status) -> NoReturn:
    await context.abort(
        CODES[status.code],
        status.message,
        trailing_metadata=(("grpc-status-details-bin", status.SerializeToString()),),
    )


def _opaque() -> Status:
    return status_from_error(RosterError("internal error; the server's log has the details"))


def _bad_request(error: RosterError) -> BadRequest:
    bad, left = BadRequest(), MAX_VIOLATION_BYTES
    for violation in error.violations[:MAX_VIOLATIONS]:
        left -= len(violation.field) + len(violation.message.encode())
        if left < 0:
            break
        bad.field_violations.add(field=violation.field, description=violation.message)
    return bad


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
