"""The domain errors. They know no transport; `status.py` has the table of status codes.

RosterError
├── InvalidArgument      InvalidField InvalidMask InvalidFilter InvalidOrder InvalidPageToken
│                        InvalidOptions MalformedMessage TooLarge
├── NotFound             UserNotFound PostNotFound LoadNotFound ServiceNotFound
├── AlreadyExists        EmailTaken IdTaken RequestIdReused
├── FailedPrecondition   AuthorNotFound OptionsChanged LoadFinished LoadAborted LoadExpired TooManyFailures
├── Aborted              VersionMismatch LoadFenced
├── OutOfRange           OffsetGap
├── ResourceExhausted    RateLimited QuotaExceeded
├── Unavailable          PoolExhausted Overloaded DatabaseUnavailable Draining
├── Unauthenticated
├── PermissionDenied
├── StatementTimeout
└── OutcomeUnknown
"""

from dataclasses import dataclass
from functools import cache
from typing import Self


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request: the path of the field, and a sentence."""

    field: str
    message: str


class RosterError(Exception):
    """What a caller is told: a reason to switch on, a sentence to read, facts to act on.

    `field` is the path of the field at fault, "" where there is none. No message echoes a value.
    """

    reason: str = "INTERNAL"
    retry_after_seconds: float | None = None

    def __init__(self, message: str, *, field: str = "", **facts: int | str) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.facts = facts

    @property
    def violations(self) -> list[Violation]:
        """The fields at fault."""
        return [Violation(self.field, self.message)] if self.field else []


class InvalidArgument(RosterError):
    """The request is wrong whatever the state of the system."""


class InvalidField(InvalidArgument):
    """One or more fields have values that can't be accepted."""

    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, violations: list[Violation]) -> "InvalidField":
        """Return one error for several fields; its message is the first one's."""
        error = cls(violations[0].message, field=violations[0].field)
        error._violations = violations
        return error

    _violations: list[Violation] | None = None

    @property
    def violations(self) -> list[Violation]:
        return self._violations or super().violations


class InvalidMask(InvalidArgument):
    reason = "INVALID_MASK"


class InvalidFilter(InvalidArgument):
    reason = "INVALID_FILTER"


class InvalidOrder(InvalidArgument):
    reason = "INVALID_ORDER"


class InvalidPageToken(InvalidArgument):
    reason = "INVALID_PAGE_TOKEN"


class InvalidOptions(InvalidArgument):
    reason = "INVALID_OPTIONS"


class MalformedMessage(InvalidArgument):
    reason = "MALFORMED_MESSAGE"


class TooLarge(InvalidArgument):
    reason = "TOO_LARGE"


class NotFound(RosterError):
    """The resource named does not exist."""


class UserNotFound(NotFound):
    reason = "USER_NOT_FOUND"


class PostNotFound(NotFound):
    reason = "POST_NOT_FOUND"


class LoadNotFound(NotFound):
    reason = "LOAD_NOT_FOUND"


class ServiceNotFound(NotFound):
    """Health was asked for a service that this server does not have."""

    reason = "SERVICE_NOT_FOUND"


class AlreadyExists(RosterError):
    """A unique key is taken; the fact `existing_id` says by which row, where it may be told."""


class EmailTaken(AlreadyExists):
    reason = "EMAIL_TAKEN"


class IdTaken(AlreadyExists):
    reason = "ID_TAKEN"


class RequestIdReused(AlreadyExists):
    reason = "REQUEST_ID_REUSED"


class FailedPrecondition(RosterError):
    """The state of the system forbids it; trying again changes nothing."""


class AuthorNotFound(FailedPrecondition):
    reason = "AUTHOR_NOT_FOUND"


class OptionsChanged(FailedPrecondition):
    reason = "OPTIONS_CHANGED"


class LoadFinished(FailedPrecondition):
    reason = "LOAD_FINISHED"


class LoadAborted(FailedPrecondition):
    reason = "LOAD_ABORTED"


class LoadExpired(FailedPrecondition):
    reason = "LOAD_EXPIRED"


class TooManyFailures(FailedPrecondition):
    reason = "TOO_MANY_FAILURES"


class Aborted(RosterError):
    """Somebody else was first; read again, then decide."""


class VersionMismatch(Aborted):
    reason = "VERSION_MISMATCH"


class LoadFenced(Aborted):
    reason = "LOAD_FENCED"


class OutOfRange(RosterError):
    """The position asked for is not reachable now."""


class OffsetGap(OutOfRange):
    reason = "OFFSET_GAP"


class ResourceExhausted(RosterError):
    """The caller has taken all that one may; nothing was done, try again after `retry_after_seconds`."""

    retry_after_seconds = 1.0


class RateLimited(ResourceExhausted):
    reason = "RATE_LIMITED"


class QuotaExceeded(ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


class Unavailable(RosterError):
    """Nothing was done; safe to try again after `retry_after_seconds`."""

    retry_after_seconds = 1.0


class PoolExhausted(Unavailable):
    reason = "POOL_EXHAUSTED"


class Overloaded(Unavailable):
    reason = "OVERLOADED"


class DatabaseUnavailable(Unavailable):
    reason = "DATABASE_UNAVAILABLE"


class Draining(Unavailable):
    reason = "DRAINING"
    retry_after_seconds = 0.1  # elsewhere; the address of this server may have another behind it


class Refused(RosterError):
    """A call that is not let in; `cause` is for the log, as it would tell a stranger what to try next."""

    sentence = ""
    cause = ""

    @classmethod
    def because(cls, cause: str) -> Self:
        """Return the error with what its caller is told, whatever the cause."""
        error = cls(cls.sentence)
        error.cause = cause
        return error


class Unauthenticated(Refused):
    """Nobody knows who calls."""

    reason = "UNAUTHENTICATED"
    sentence = "a valid token or client certificate is required"


class PermissionDenied(Refused):
    """The caller has no role that allows it."""

    reason = "PERMISSION_DENIED"
    sentence = "the caller has no role that allows this"


class StatementTimeout(RosterError):
    """The database gave up on a statement that took too long."""

    reason = "STATEMENT_TIMEOUT"


class OutcomeUnknown(RosterError):
    """The connection broke during a commit: the write is in, or it is not."""

    reason = "OUTCOME_UNKNOWN"


def error_of(
    reason: str, message: str, field: str = "", facts: dict[str, int | str] | None = None
) -> RosterError:
    """Return an error that was stored, or sent, as its parts; raises KeyError for a reason not known here."""
    return _kind(reason)(message, field=field, **(facts or {}))


@cache
def _kind(reason: str) -> type[RosterError]:
    return _kinds(RosterError)[reason]


def _kinds(base: type[RosterError]) -> dict[str, type[RosterError]]:
    kinds = {base.reason: base}
    for kind in base.__subclasses__():
        kinds = _kinds(kind) | kinds
    return kinds
