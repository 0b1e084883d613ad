"""Driver error -> domain error: what is told, what is logged, and what stays an error of ours."""

import sqlite3
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError as PoolTimeoutError

from service.db.errors import domain_error, may_have_happened, translated
from service.errors import DatabaseUnavailable, PoolExhausted, RosterError, StatementTimeout, UserNotFound

SECRET = "postgresql://roster:hunter2@db/roster"


def sqlite_error(name: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(SECRET)
    error.sqlite_errorname = name
    return error


def wrapped(error: Exception, *, is_connection_gone: bool = False) -> DBAPIError:
    """Return the error as SQLAlchemy raises it."""
    return DBAPIError("SELECT secret", {}, error, connection_invalidated=is_connection_gone)


TOLD: list[tuple[Exception, type[RosterError]]] = [
    (asyncpg.ConnectionDoesNotExistError(SECRET), DatabaseUnavailable),
    (asyncpg.CannotConnectNowError(SECRET), DatabaseUnavailable),
    (asyncpg.AdminShutdownError(SECRET), DatabaseUnavailable),
    (asyncpg.CrashShutdownError(SECRET), DatabaseUnavailable),
    (asyncpg.TooManyConnectionsError(SECRET), DatabaseUnavailable),
    (asyncpg.DiskFullError(SECRET), DatabaseUnavailable),
    (asyncpg.InvalidPasswordError(SECRET), DatabaseUnavailable),
    (asyncpg.DeadlockDetectedError(SECRET), DatabaseUnavailable),
    (asyncpg.SerializationError(SECRET), DatabaseUnavailable),
    (asyncpg.LockNotAvailableError(SECRET), DatabaseUnavailable),
    (asyncpg.IdleInTransactionSessionTimeoutError(SECRET), DatabaseUnavailable),
    (asyncpg.ReadOnlySQLTransactionError(SECRET), DatabaseUnavailable),
    (asyncpg.InvalidCachedStatementError(SECRET), DatabaseUnavailable),
    (asyncpg.QueryCanceledError(SECRET), StatementTimeout),
    (sqlite_error("SQLITE_BUSY"), DatabaseUnavailable),
    (sqlite_error("SQLITE_BUSY_SNAPSHOT"), DatabaseUnavailable),
    (sqlite_error("SQLITE_LOCKED"), DatabaseUnavailable),
    (sqlite_error("SQLITE_CANTOPEN"), DatabaseUnavailable),
    (sqlite_error("SQLITE_FULL"), DatabaseUnavailable),
    (sqlite_error("SQLITE_IOERR_FSYNC"), DatabaseUnavailable),
    (sqlite_error("SQLITE_READONLY"), DatabaseUnavailable),
]
UNTOLD: list[Exception] = [
    asyncpg.UniqueViolationError(SECRET),
    asyncpg.UndefinedTableError(SECRET),
    asyncpg.CharacterNotInRepertoireError(SECRET),
    asyncpg.DataError(SECRET),
    sqlite_error("SQLITE_CONSTRAINT_UNIQUE"),
    sqlite_error("SQLITE_ERROR"),
    sqlite_error("SQLITE_CORRUPT"),
    ValueError(SECRET),
]


@pytest.mark.parametrize(("error", "kind"), TOLD)
def test_a_code_says_what_the_caller_is_told(error: Exception, kind: type[RosterError]) -> None:
    """Bare or wrapped by SQLAlchemy, the code decides, its longest known prefix first."""
    for raised in (error, wrapped(error)):
        told = domain_error(raised)

        assert type(told) is kind
        assert SECRET not in str(told)


@pytest.mark.parametrize("error", UNTOLD)
def test_other_errors_are_ours(error: Exception) -> None:
    """A caller can't do anything about them: they come out as they are, for the log."""
    assert domain_error(error) is None
    assert domain_error(wrapped(error)) is None
    with pytest.raises(type(error), match="hunter2"), translated():
        raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PoolTimeoutError(SECRET), PoolExhausted),
        (TimeoutError(SECRET), StatementTimeout),
        (ConnectionRefusedError(SECRET), DatabaseUnavailable),
        (OSError(SECRET), DatabaseUnavailable),
        (wrapped(asyncpg.InterfaceError(SECRET), is_connection_gone=True), DatabaseUnavailable),
    ],
)
def test_an_error_without_a_code_is_told_by_its_kind(error: Exception, kind: type[RosterError]) -> None:
    """The pool's, a time-out, and a connection that is gone."""
    assert type(domain_error(error)) is kind


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (wrapped(asyncpg.InterfaceError(SECRET), is_connection_gone=True), True),
        (TimeoutError(), True),
        (wrapped(asyncpg.ConnectionDoesNotExistError(SECRET)), True),
        (wrapped(asyncpg.AdminShutdownError(SECRET)), True),
        (wrapped(sqlite_error("SQLITE_IOERR_FSYNC")), True),
        (wrapped(asyncpg.SerializationError(SECRET)), False),
        (IntegrityError(None, None, asyncpg.ForeignKeyViolationError(SECRET)), False),
        (wrapped(asyncpg.DiskFullError(SECRET)), False),
        (wrapped(sqlite_error("SQLITE_BUSY")), False),
        (wrapped(sqlite_error("SQLITE_FULL")), False),
    ],
)
def test_a_commit_may_have_happened_unless_it_was_refused(error: Exception, expected: bool) -> None:
    """Who got no answer doesn't know; who got a refusal does."""
    assert may_have_happened(error) is expected


def test_what_is_told_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    """The log has what the caller must not see."""
    with pytest.raises(DatabaseUnavailable) as caught, translated():
        raise wrapped(asyncpg.TooManyConnectionsError("too many clients"))

    assert "too many clients" not in str(caught.value)
    assert "DATABASE_UNAVAILABLE" in caplog.text
    assert "too many clients" in caplog.text


def test_a_domain_error_passes_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """It was raised inside the unit of work on purpose."""
    error: Any = UserNotFound("there is no such user")
    with pytest.raises(UserNotFound) as caught, translated():
        raise error

    assert caught.value is error
    assert not caplog.records
