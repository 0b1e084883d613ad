"""Driver error -> domain error: what callers see, what is logged, and what remains a bug."""

import errno
import sqlite3
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError as PoolTimeoutError

from roster.errors import DatabaseUnavailable, PoolExhausted, RosterError, StatementTimeout, UserNotFound
from service.db.errors import cause_of, domain_error, is_transient, may_have_committed, translate_errors

SECRET = "postgresql://roster:hunter2@db/roster"
# How Citus reports, as an internal error, that a worker is lost.
LOST_WORKERS = [
    "failure on connection marked as essential: 10.0.0.7:5432",
    "failed to prepare transaction 'citus_0_4711_9_0' on host 10.0.0.7:5432",
    "could not commit transaction for shard 102010 on at least one active node",
]


def sqlite_error(name: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(SECRET)
    error.sqlite_errorname = name
    return error


def wrapped(error: Exception, *, is_connection_gone: bool = False) -> DBAPIError:
    """Return the error as SQLAlchemy raises it."""
    return DBAPIError("SELECT secret", {}, error, connection_invalidated=is_connection_gone)


TRANSLATED: list[tuple[Exception, type[RosterError]]] = [
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
    (asyncpg.InvalidSQLStatementNameError(SECRET), DatabaseUnavailable),
    (asyncpg.DuplicatePreparedStatementError(SECRET), DatabaseUnavailable),
    (asyncpg.ProtocolViolationError(SECRET), DatabaseUnavailable),
    (asyncpg.InternalClientError(SECRET), DatabaseUnavailable),
    *((asyncpg.InternalServerError(message), DatabaseUnavailable) for message in LOST_WORKERS),
    (asyncpg.QueryCanceledError(SECRET), StatementTimeout),
    (sqlite_error("SQLITE_BUSY"), DatabaseUnavailable),
    (sqlite_error("SQLITE_BUSY_SNAPSHOT"), DatabaseUnavailable),
    (sqlite_error("SQLITE_LOCKED"), DatabaseUnavailable),
    (sqlite_error("SQLITE_CANTOPEN"), DatabaseUnavailable),
    (sqlite_error("SQLITE_FULL"), DatabaseUnavailable),
    (sqlite_error("SQLITE_IOERR_FSYNC"), DatabaseUnavailable),
    (sqlite_error("SQLITE_READONLY"), DatabaseUnavailable),
]
BUGS: list[Exception] = [
    asyncpg.UniqueViolationError(SECRET),
    asyncpg.UndefinedTableError(SECRET),
    asyncpg.CharacterNotInRepertoireError(SECRET),
    asyncpg.DataError(SECRET),
    asyncpg.FeatureNotSupportedError(SECRET),
    asyncpg.InternalServerError(SECRET),
    asyncpg.OutdatedSchemaCacheError(SECRET),
    sqlite_error("SQLITE_CONSTRAINT_UNIQUE"),
    sqlite_error("SQLITE_ERROR"),
    sqlite_error("SQLITE_CORRUPT"),
    ValueError(SECRET),
]


@pytest.mark.parametrize(("error", "kind"), TRANSLATED)
def test_translates_errors_by_code(error: Exception, kind: type[RosterError]) -> None:
    """The longest known prefix of the code decides, whether or not SQLAlchemy wraps the error."""
    for raised in (error, wrapped(error)):
        translated = domain_error(raised)

        assert type(translated) is kind
        assert SECRET not in str(translated)


@pytest.mark.parametrize("error", BUGS)
def test_leaves_other_errors_as_they_are(error: Exception) -> None:
    """They are bugs, which no caller can fix: they are raised unchanged, and logged."""
    assert domain_error(error) is None
    assert domain_error(wrapped(error)) is None
    with pytest.raises(type(error), match="hunter2"), translate_errors():
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
def test_translates_errors_without_a_code_by_class(error: Exception, kind: type[RosterError]) -> None:
    """The pool's timeout, the driver's timeout, and a lost connection."""
    assert type(domain_error(error)) is kind


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (wrapped(asyncpg.InterfaceError(SECRET), is_connection_gone=True), True),
        (TimeoutError(), True),
        (wrapped(asyncpg.ConnectionDoesNotExistError(SECRET)), True),
        (wrapped(asyncpg.AdminShutdownError(SECRET)), True),
        *((wrapped(asyncpg.InternalServerError(message)), True) for message in LOST_WORKERS),
        (wrapped(sqlite_error("SQLITE_IOERR_FSYNC")), True),
        (wrapped(asyncpg.SerializationError(SECRET)), False),
        (IntegrityError(None, None, asyncpg.ForeignKeyViolationError(SECRET)), False),
        (wrapped(asyncpg.DiskFullError(SECRET)), False),
        (wrapped(sqlite_error("SQLITE_BUSY")), False),
        (wrapped(sqlite_error("SQLITE_FULL")), False),
    ],
)
def test_a_commit_may_have_succeeded_unless_it_was_refused(error: Exception, expected: bool) -> None:
    """A lost answer leaves the outcome open; a refusal does not."""
    assert may_have_committed(error) is expected


def test_logs_the_cause_of_a_translated_error(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the details that the caller must not see."""
    with pytest.raises(DatabaseUnavailable) as caught, translate_errors():
        raise wrapped(asyncpg.TooManyConnectionsError("too many clients"))

    assert "too many clients" not in str(caught.value)
    assert "DATABASE_UNAVAILABLE" in caplog.text
    assert "too many clients" in caplog.text


def test_raises_domain_errors_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    """The unit of work has raised them on purpose."""
    error: Any = UserNotFound("there is no such user")
    with pytest.raises(UserNotFound) as caught, translate_errors():
        raise error

    assert caught.value is error
    assert not caplog.records


def test_error_without_a_text_has_a_cause() -> None:
    """As the driver's own timeout, which ends a statement of a server that does not answer."""
    assert cause_of(TimeoutError()) == "TimeoutError"
    with pytest.raises(StatementTimeout), translate_errors():
        raise TimeoutError


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unsupported startup parameter: options", False),
        ('"trust" authentication failed', False),
        ('database "roster" does not exist', False),
        ("no such user", False),
        ("transaction blocks not allowed in statement pooling mode", False),
        ("no more connections allowed (max_client_conn)", True),
        ('database "roster" is disabled', True),
        ("pgbouncer cannot connect to server", True),
        ("client_login_timeout (server down)", True),
        ("query_wait_timeout", True),
    ],
)
def test_start_waits_for_a_pooler_only_if_that_helps(message: str, *, expected: bool) -> None:
    """PgBouncer reports all of these with one code, that of a violated protocol."""
    assert is_transient(wrapped(asyncpg.ProtocolViolationError(message))) is expected
    sent: Any = asyncpg.PostgresError
    reported = sent.new({"S": "FATAL", "C": "08P01", "M": message})
    reported.__cause__ = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert is_transient(wrapped(reported)) is expected
