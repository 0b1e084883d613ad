"""Driver error -> domain error: by SQLSTATE on PostgreSQL, by error name on SQLite.

Only a repository knows the meaning of a violated constraint, so repositories catch IntegrityError themselves.
"""

import logging
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
from sqlalchemy.exc import DBAPIError, TimeoutError as PoolTimeoutError

from roster.errors import DatabaseUnavailable, PoolExhausted, RosterError, StatementTimeout

log = logging.getLogger(__name__)

BUSY = "the database is busy with other writes; nothing was done, try again"
UNREACHABLE = "the database can't be reached; nothing was done, try again"
MIGRATED = "the database schema has just changed; nothing was done, try again"
POOLED = (
    "the database is behind a pooler in transaction mode, for which the server is not set up "
    "(ROSTER_DATABASE_POOLER); nothing was done, try again"
)
SLOW = "the database took too long; request less, or try again later"

# Parts of messages that contain row values: PostgreSQL's DETAIL, such as `Key (email)=(ada@example.org)
# already exists`, and asyncpg's errors about arguments.
VALUES = re.compile(r"\nDETAIL:.*|(?<=invalid input for query argument ).*", re.DOTALL)

NUMBER = re.compile(r"\[Errno (\d+)\]")
# What getaddrinfo says of a name that does not exist, or that has no address.
UNKNOWN = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}

CONNECTION_FAILURE = "08006"
INTERNAL_ERROR = "XX000"
# Citus reports in these words, as an internal error, that a worker is lost. The second line is what libpq and
# the worker say.
LOST_WORKER = re.compile(
    "connection marked as essential|failed to (prepare transaction|COPY)|could not commit transaction for"
    "|server closed the connection|(no|lost) connection|connection not open|terminating connection"
)
# A cached plan no longer fits the schema. What PostgreSQL or Citus does not support has this code too.
OUTDATED_PLAN = "0A000"

# The longest prefix wins. https://www.postgresql.org/docs/current/errcodes-appendix.html
BY_CODE: dict[str, tuple[type[RosterError], str]] = {
    "08": (DatabaseUnavailable, UNREACHABLE),  # connection exceptions
    OUTDATED_PLAN: (DatabaseUnavailable, MIGRATED),
    "25006": (DatabaseUnavailable, UNREACHABLE),  # read-only: a standby, during a failover
    "25P03": (DatabaseUnavailable, UNREACHABLE),  # idle_in_transaction_session_timeout
    "26000": (DatabaseUnavailable, POOLED),  # a prepared statement that another session has
    "28": (DatabaseUnavailable, UNREACHABLE),  # invalid role or password
    "42P05": (DatabaseUnavailable, POOLED),  # a prepared statement that somebody else has made
    "40": (DatabaseUnavailable, BUSY),  # deadlock or serialization failure: rolled back
    "53": (DatabaseUnavailable, UNREACHABLE),  # too many connections, disk or memory full
    "55P03": (DatabaseUnavailable, BUSY),  # lock_timeout
    "57": (DatabaseUnavailable, UNREACHABLE),  # shutting down, or starting up
    "58030": (DatabaseUnavailable, UNREACHABLE),  # of a disk; of Citus, when a worker is lost
    "57014": (StatementTimeout, SLOW),
    "SQLITE_BUSY": (DatabaseUnavailable, BUSY),
    "SQLITE_LOCKED": (DatabaseUnavailable, BUSY),
    "SQLITE_CANTOPEN": (DatabaseUnavailable, UNREACHABLE),
    "SQLITE_INTERRUPT": (StatementTimeout, SLOW),
    "SQLITE_FULL": (DatabaseUnavailable, UNREACHABLE),
    "SQLITE_IOERR": (DatabaseUnavailable, UNREACHABLE),
    "SQLITE_READONLY": (DatabaseUnavailable, UNREACHABLE),
}


POOLER_IS_FULL = "query_wait_timeout"  # reported by PgBouncer to a client that has waited too long
# Poolers report these with the code of other errors, but waiting does not help.
REFUSED_BY_POOLER = re.compile(
    "unsupported startup parameter|authentication failed|does not exist|no such (user|database)"
    "|not allowed in statement pooling mode"
)
# A start waits for the end of these; nothing else that PostgreSQL reports ends by itself.
TRANSIENT = ("08", "25006", "40", "53", "55", "57", "58", "SQLITE_BUSY", "SQLITE_LOCKED")


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE, or the name of SQLite's error code; "" if there is neither."""
    for cause in _chain(error):
        code: Any = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
        if code == INTERNAL_ERROR and LOST_WORKER.search(str(cause).partition("\n")[0]):
            return CONNECTION_FAILURE
        if code:
            return str(code)
    return ""


class NoUsableHost(ConnectionError):
    """No host of the database URL can be used; the message names each with its own cause.

    `was_reached` is whether one of them has answered.
    """

    def __init__(self, message: str, *, was_reached: bool) -> None:
        super().__init__(message)
        self.was_reached = was_reached


def cause_of(error: BaseException) -> str:
    """Return the message of the server, else of the driver, without what SQLAlchemy adds, or of each host."""
    causes = [each for each in _chain(error) if str(each)]
    hosts = [each for each in causes if isinstance(each, NoUsableHost)]
    # Only errors that a server has sent have a severity. They say more than the reset that may follow them.
    sent = [each for each in causes if getattr(each, "severity", None)]
    named = hosts or sent or causes
    return str(named[-1]).partition("\n")[0] if named else type(error).__name__


def short_cause(error: BaseException) -> str:
    """Return why a connection failed, without numbers, addresses and names of the code."""
    if isinstance(error, socket.gaierror):
        return "the name is not known" if error.errno in UNKNOWN else str(error.strerror).lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate can't be verified: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"
    # asyncio reports several addresses of a name in one error, which has no number of its own.
    numbers = [error.errno] if isinstance(error, OSError) and error.errno else _numbers(str(error))
    causes = dict.fromkeys(os.strerror(number).lower() for number in numbers)
    return ", ".join(causes) or str(error).partition("\n")[0]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in NUMBER.findall(text)]


def is_ending(error: BaseException) -> bool:
    """Return whether asyncpg has refused a statement because it handles the end of the connection."""
    return any(type(cause) is asyncpg.InternalClientError for cause in _chain(error))


def _has(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in _chain(error))


def is_refused_by_pooler(error: BaseException) -> bool:
    """Return whether a pooler has refused a connection for a reason that does not end by itself."""
    return code_of(error).startswith("08") and bool(REFUSED_BY_POOLER.search(cause_of(error)))


def is_transient(error: BaseException) -> bool:
    """Return whether waiting may help: the database can't be reached, is busy, or is not ready yet."""
    if code := code_of(error):
        return code.startswith(TRANSIENT) and not is_refused_by_pooler(error)
    causes = [*_chain(error)]
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return False
    is_disconnected = isinstance(error, DBAPIError) and error.connection_invalidated
    return is_disconnected or any(isinstance(cause, OSError) for cause in causes)


def domain_error(error: BaseException) -> RosterError | None:
    """Return the domain error for a driver's error; None if the error is a bug."""
    if isinstance(error, PoolTimeoutError):
        return PoolExhausted("all connections to the database are in use; nothing was done, try again")
    code = code_of(error)
    if code.startswith("08") and POOLER_IS_FULL in cause_of(error):
        return PoolExhausted("the pooler has no connection to the database; nothing was done, try again")
    is_unsupported = code == OUTDATED_PLAN and not _has(error, asyncpg.InvalidCachedStatementError)
    for length in range(len(code), 1, -1):
        if code[:length] in BY_CODE and not is_unsupported:
            error_class, message = BY_CODE[code[:length]]
            return error_class(message)
    if isinstance(error, TimeoutError):  # command_timeout
        return StatementTimeout(SLOW)
    is_disconnected = isinstance(error, DBAPIError) and error.connection_invalidated
    if is_disconnected or is_ending(error) or isinstance(error, OSError):
        return DatabaseUnavailable(UNREACHABLE)
    return None


def may_have_committed(error: BaseException) -> bool:
    """Return whether a commit that raised this error may have succeeded: its answer was lost."""
    code = code_of(error)
    return not code or code.startswith(("08", "57", "SQLITE_IOERR"))


@contextmanager
def translate_errors(place: str = "") -> Iterator[None]:
    """Turn a driver's error into the domain error, and log its cause and its place."""
    try:
        yield
    except RosterError:
        raise
    except Exception as error:
        _hide_values(error)
        known = domain_error(error)
        if known is None:
            raise
        log.warning("%s%s: %s", known.reason, place, cause_of(error))
        raise known from error


def _hide_values(error: BaseException) -> None:
    """Remove row values and parameters from a driver's error, before it can be logged."""
    for cause in _chain(error):
        if isinstance(getattr(cause, "detail", None), str):
            cause.detail = None  # type: ignore[attr-defined]
        args = list(cause.args)
        for position, part in enumerate(args):
            if isinstance(part, str):
                args[position] = VALUES.sub("", part)
        cause.args = tuple(args)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "orig", None) or error.__cause__
