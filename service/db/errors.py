"""Driver error -> domain error: by SQLSTATE on PostgreSQL, by error name on SQLite.

What a violated constraint means only a repository knows; it catches IntegrityError itself.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import DBAPIError, TimeoutError as PoolTimeoutError

from service.errors import DatabaseUnavailable, PoolExhausted, RosterError, StatementTimeout

log = logging.getLogger(__name__)

BUSY = "the database is busy with other writes; nothing was done, try again"
AWAY = "the database can't be reached; nothing was done, try again"
MIGRATED = "the database was just migrated; nothing was done, try again"
SLOW = "the database took too long over this call; ask for less, or try later"

# In a DETAIL of PostgreSQL's, as `Key (email)=(ada@example.org) already exists`, and of asyncpg's own.
VALUES = re.compile(r"\nDETAIL:.*|(?<=invalid input for query argument ).*", re.DOTALL)

# The longest prefix wins. https://www.postgresql.org/docs/current/errcodes-appendix.html
BY_CODE: dict[str, tuple[type[RosterError], str]] = {
    "08": (DatabaseUnavailable, AWAY),  # connection exceptions
    "0A000": (DatabaseUnavailable, MIGRATED),  # a cached plan is invalid
    "25006": (DatabaseUnavailable, AWAY),  # read-only: a standby, until the failover is through
    "25P03": (DatabaseUnavailable, AWAY),  # idle in transaction for too long
    "28": (DatabaseUnavailable, AWAY),  # a role or a password that the server refuses
    "40": (DatabaseUnavailable, BUSY),  # deadlock or serialization failure: rolled back whole
    "53": (DatabaseUnavailable, AWAY),  # too many connections, disk or memory full
    "55P03": (DatabaseUnavailable, BUSY),  # lock_timeout
    "57": (DatabaseUnavailable, AWAY),  # shut down, or starting up
    "57014": (StatementTimeout, SLOW),
    "SQLITE_BUSY": (DatabaseUnavailable, BUSY),
    "SQLITE_LOCKED": (DatabaseUnavailable, BUSY),
    "SQLITE_CANTOPEN": (DatabaseUnavailable, AWAY),
    "SQLITE_INTERRUPT": (StatementTimeout, SLOW),
    "SQLITE_FULL": (DatabaseUnavailable, AWAY),
    "SQLITE_IOERR": (DatabaseUnavailable, AWAY),
    "SQLITE_READONLY": (DatabaseUnavailable, AWAY),
}


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE or the name of SQLite's error code, "" where there is neither."""
    for cause in _chain(error):
        code: Any = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
        if code:
            return str(code)
    return ""


def domain_error(error: BaseException) -> RosterError | None:
    """Return what a caller is told of a driver's error, None where it is a fault of ours."""
    if isinstance(error, PoolTimeoutError):
        return PoolExhausted("all connections to the database are in use; nothing was done, try again")
    code = code_of(error)
    for length in range(len(code), 1, -1):
        if kind := BY_CODE.get(code[:length]):
            return kind[0](kind[1])
    if isinstance(error, TimeoutError):  # command_timeout
        return StatementTimeout(SLOW)
    is_connection = isinstance(error, OSError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )
    return DatabaseUnavailable(AWAY) if is_connection else None


def may_have_happened(error: BaseException) -> bool:
    """Tell whether a commit that ended so may be in all the same: its answer was lost, not a refusal."""
    code = code_of(error)
    return not code or code.startswith(("08", "57", "SQLITE_IOERR"))


@contextmanager
def translated() -> Iterator[None]:
    """Raise the domain error for a driver's error, which is logged."""
    try:
        yield
    except RosterError:
        raise
    except Exception as error:
        _hide_values(error)
        known = domain_error(error)
        if known is None:
            raise
        log.warning("%s: %s", known.reason, error.__cause__ or error)
        raise known from error


def _hide_values(error: BaseException) -> None:
    """Take out what a driver's error repeats of rows and parameters, before anybody logs it."""
    for cause in _chain(error):
        if isinstance(getattr(cause, "detail", None), str):
            cause.detail = None  # type: ignore[attr-defined]
        cause.args = tuple(VALUES.sub("", part) if isinstance(part, str) else part for part in cause.args)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "orig", None) or error.__cause__
