"""Domain errors. They are independent of the transport; the server maps each to one gRPC status.

RosterError
├── InvalidArgument      InvalidField InvalidMask InvalidFilter InvalidOrder InvalidPageToken
│                        InvalidOptions InvalidToken MalformedMessage TooLarge
├── NotFound             UserNotFound PostNotFound LoadNotFound ServiceNotFound
├── AlreadyExists        EmailTaken IdTaken RequestIdReused
├── FailedPrecondition   AuthorNotFound UserHasPosts UnreadableHash OptionsChanged LoadFinished LoadAborted
│                        LoadExpired TooManyFailures FeedReset
├── Aborted              VersionMismatch LoadFenced
├── OutOfRange           OffsetGap TokenExpired
├── ResourceExhausted    RateLimited QuotaExceeded
├── Unavailable          PoolExhausted Overloaded DatabaseUnavailable Draining
├── Unauthenticated
├── PermissionDenied
├── StatementTimeout
├── Unsupported
└── OutcomeUnknown
"""

from dataclasses import dataclass
from functools import cache

from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class Violation:
    """One invalid field of a request: its path, and a sentence."""

    field: str
    message: str


class RosterError(Exception):
    """Base class of the errors that callers see: a reason for programs, a message for people, and facts.

    `field` is the path of the invalid field, "" if there is none. Messages never contain values of the
    request or of rows.
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
        """The invalid fields."""
        return [Violation(self.field, self.message)] if self.field else []


class InvalidArgument(RosterError):
    """The request is invalid, whatever the state of the system."""


class InvalidField(InvalidArgument):
    """One or more fields have invalid values."""

    reason = "INVALID_FIELD"
    _violations: list[Violation] | None = None

    @property
    def violations(self) -> list[Violation]:
        return self._violations or super().violations

    @classmethod
    def of(cls, violations: list[Violation]) -> "InvalidField":
        """Return one error for several fields, with the message of the first."""
        error = cls(violations[0].message, field=violations[0].field)
        error._violations = violations
        return error


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


class InvalidToken(InvalidArgument):
    """The metadata has a consistency token that can't be decoded."""

    reason = "INVALID_TOKEN"


class MalformedMessage(InvalidArgument):
    reason = "MALFORMED_MESSAGE"


class TooLarge(InvalidArgument):
    reason = "TOO_LARGE"


class NotFound(RosterError):
    """The requested resource does not exist."""


class UserNotFound(NotFound):
    reason = "USER_NOT_FOUND"


class PostNotFound(NotFound):
    reason = "POST_NOT_FOUND"


class LoadNotFound(NotFound):
    reason = "LOAD_NOT_FOUND"


class ServiceNotFound(NotFound):
    """A health check named a service that this server does not have."""

    reason = "SERVICE_NOT_FOUND"


class AlreadyExists(RosterError):
    """A unique key is taken. The fact `existing_id` is the row that has it, if the caller may know."""


class EmailTaken(AlreadyExists):
    reason = "EMAIL_TAKEN"


class IdTaken(AlreadyExists):
    reason = "ID_TAKEN"


class RequestIdReused(AlreadyExists):
    reason = "REQUEST_ID_REUSED"


class FailedPrecondition(RosterError):
    """The state of the system forbids the request; retrying does not help."""


class AuthorNotFound(FailedPrecondition):
    reason = "AUTHOR_NOT_FOUND"


class UserHasPosts(FailedPrecondition):
    """A user who has posts was to be deleted without them."""

    reason = "USER_HAS_POSTS"


class UnreadableHash(FailedPrecondition):
    """The stored hash of a user can't be checked; no password is right or wrong until a new one is set."""

    reason = "UNREADABLE_HASH"


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


class FeedReset(FailedPrecondition):
    """The log of changes does not continue where the token was made."""

    reason = "FEED_RESET"


class Aborted(RosterError):
    """A concurrent change came first: read the resource again, then decide whether to retry."""


class VersionMismatch(Aborted):
    reason = "VERSION_MISMATCH"

    @classmethod
    def of(cls, current: int) -> Self:
        """Return the error for a row whose version is now `current`."""
        message = f"version is now {current}; read the row again and retry"
        return cls(message, field="version", version=current)


class LoadFenced(Aborted):
    reason = "LOAD_FENCED"


class OutOfRange(RosterError):
    """The requested position does not exist yet, or not any more."""


class OffsetGap(OutOfRange):
    reason = "OFFSET_GAP"


class TokenExpired(OutOfRange):
    """The position of a token is before the log of changes begins."""

    reason = "TOKEN_EXPIRED"


class ResourceExhausted(RosterError):
    """The caller has used up its share. Nothing was done; retry after `retry_after_seconds`."""

    retry_after_seconds = 1.0


class RateLimited(ResourceExhausted):
    reason = "RATE_LIMITED"


class QuotaExceeded(ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


class Unavailable(RosterError):
    """Nothing was done; it is safe to retry after `retry_after_seconds`."""

    retry_after_seconds = 1.0


class PoolExhausted(Unavailable):
    reason = "POOL_EXHAUSTED"


class Overloaded(Unavailable):
    reason = "OVERLOADED"


class DatabaseUnavailable(Unavailable):
    reason = "DATABASE_UNAVAILABLE"


class Draining(Unavailable):
    reason = "DRAINING"
    retry_after_seconds = 0.1  # on another server, which the same address may lead to


class Refused(RosterError):
    """A call without the necessary identity or role.

    The caller always gets the same message. The `cause` is for the log only: it would show an attacker what
    to try next.
    """

    public_message = ""
    cause = ""

    @classmethod
    def because(cls, cause: str) -> Self:
        """Return the error with its public message, and the cause to log."""
        error = cls(cls.public_message)
        error.cause = cause
        return error


class Unauthenticated(Refused):
    """The caller could not be identified."""

    reason = "UNAUTHENTICATED"
    public_message = "a valid token or client certificate is required"


class PermissionDenied(Refused):
    """The caller has no role that allows the call."""

    reason = "PERMISSION_DENIED"
    public_message = "the caller has no role that allows this"


class StatementTimeout(RosterError):
    """A statement exceeded its time limit and was cancelled."""

    reason = "STATEMENT_TIMEOUT"


class Unsupported(RosterError):
    """The database lacks what the RPC needs."""

    reason = "UNSUPPORTED"


class OutcomeUnknown(RosterError):
    """The connection broke during a commit: the write may or may not have been applied."""

    reason = "OUTCOME_UNKNOWN"


def error_of(
    reason: str, message: str, field: str = "", facts: dict[str, int | str] | None = None
) -> RosterError:
    """Return an error rebuilt from its stored or received parts; raises KeyError for an unknown reason."""
    error = _class_of(reason)(message, field=field)
    error.facts = facts or {}  # not as arguments, because their names are the sender's
    return error


# Cached because a load's page of failures asks for each row. An unknown reason is looked up each time:
# a subclass that knows it may be defined later, as the client's are.
@cache
def _class_of(reason: str) -> type[RosterError]:
    return _classes_by_reason(RosterError)[reason]


def _classes_by_reason(base: type[RosterError]) -> dict[str, type[RosterError]]:
    """Return the classes below `base`; one without a reason of its own yields to its base class."""
    classes = {base.reason: base}
    for subclass in base.__subclasses__():
        classes = _classes_by_reason(subclass) | classes
    return classes
