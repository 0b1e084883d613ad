"""Converts domain errors to google.rpc.Status; `roster.client.errors` is the inverse."""

from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from roster import errors
from roster.errors import RosterError
from roster.errors.codes import status_code

DOMAIN = "roster"
# gRPC limits metadata to 16 KiB, which includes the message and the overhead of base64.
MAX_VIOLATIONS = 50
MAX_VIOLATION_BYTES = 6000


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
