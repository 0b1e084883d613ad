"""`roster migrate`: migrate the database schema."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import click
from sqlalchemy.exc import DBAPIError

from service.cli.environment import read_settings
from service.cli.terminal import UsageError, echo
from service.db import migrations, revisions
from service.db.errors import NoUsableHost, cause_of, code_of, is_refused_by_pooler
from service.db.schema import ReadOnlyDatabase, Schema
from service.db.sqlite_files import storage_problem
from service.settings import Settings, unread_databases

# https://www.postgresql.org/docs/current/errcodes-appendix.html
UNKNOWN_DATABASE = "3D000"
INSUFFICIENT_PRIVILEGE = "42501"
CREATE_DATABASE = "; create the database first, as with `createdb`"

POOLED = (
    "the database is behind a pooler in transaction mode, which can't hold the lock of a migration; set "
    "ROSTER_MIGRATION_URL to the URL of PostgreSQL itself"
)


@contextmanager
def report_migration_errors(settings: Settings) -> Iterator[None]:
    """Raise UsageError if a migration fails."""
    if settings.is_embedded and (problem := storage_problem(settings.database_url)):
        raise UsageError(problem)
    try:
        yield
    except BrokenPipeError:  # the reader of --sql has closed the pipe
        raise
    except (migrations.MigrationError, DBAPIError, OSError) as error:
        if "Can't locate revision" in str(error):
            raise UsageError(
                f"{error}; a newer release created it: use that release, or downgrade with it"
            ) from None
        hint = CREATE_DATABASE if code_of(error) == UNKNOWN_DATABASE else ""
        if isinstance(error, OSError):
            setting = "ROSTER_MIGRATION_URL" if settings.migration_url else "ROSTER_DATABASE_URL"
            raise UsageError(connection_problem(error, setting)) from None
        raise UsageError(f"the migration failed: {cause_of(error)}{hint}") from None


def connection_problem(error: Exception, setting: str = "ROSTER_DATABASE_URL") -> str:
    """Return why the database can't be used, and what to do."""
    cause = cause_of(error)
    if code_of(error) == INSUFFICIENT_PRIVILEGE:
        return f"{cause}; let the owner of the schema run deploy/sql/roles.sql again, or grant the right"
    if isinstance(error, ReadOnlyDatabase):
        return f"{cause}; check {setting}"
    hint = CREATE_DATABASE if code_of(error) == UNKNOWN_DATABASE else ""
    return f"{_failure(error)}: {cause}{hint}; check {setting}"


def _failure(error: Exception) -> str:
    """Return how far a connection came."""
    code = code_of(error)
    if code.startswith("SQLITE") or (isinstance(error, NoUsableHost) and error.was_reached):
        return "the database can't be used"
    if is_refused_by_pooler(error):
        return "the database refused the connection"
    # An error of class 08 may be that of a proxy that can't reach the database.
    if not code or code.startswith("08") or isinstance(error, NoUsableHost):
        return "the database can't be reached"
    return "the database refused the connection"


@click.command()
@click.option("--sql", is_flag=True, help="Print the SQL for an empty database without running it.")
@click.option(
    "--contract",
    is_flag=True,
    help="Complete an upgrade: also remove what only older servers need. Refused while any of them runs.",
)
@click.option(
    "--down", metavar="REVISION", help="Downgrade to this revision; data that it can't hold is dropped."
)
def migrate(down: str | None, *, sql: bool, contract: bool) -> None:
    """Migrate the schema of the database in ROSTER_DATABASE_URL to this release.

    Servers of the previous release keep running. It is safe to run this more than once, and at the same time:
    the second run waits for the first.

    If the server's role does not own the schema, or a pooler in transaction mode is in front of the
    database, set ROSTER_MIGRATION_URL: the same database, directly, with the role that owns it.
    """
    logging.basicConfig(format="%(message)s")
    for name in ("service.db", "service.changes"):  # the progress of long steps
        logging.getLogger(name).setLevel(logging.INFO)
    settings = read_settings()
    for unread in unread_databases(settings):
        echo(f"warning: {unread}", err=True)
    url = settings.direct_url
    known = ["base", *revisions.numbers()]
    if down and down not in known and not down.startswith("-"):
        raise UsageError(f"this release has no revision {down}; it has {', '.join(known)}")
    if sum([bool(down), sql, contract]) > 1:
        raise UsageError("--sql, --contract and --down exclude each other")
    with report_migration_errors(settings):
        if sql:
            migrations.sql(url)
            return
        if not settings.is_embedded and migrations.mode_of_pooler(url) == "transaction":
            raise UsageError(POOLED)
        if down:
            _report(url, lambda _: migrations.downgrade(url, down))
        else:
            _report(url, partial(_upgrade, url, goes_all_the_way=contract or settings.is_embedded))


def _upgrade(url: str, before: Schema, *, goes_all_the_way: bool) -> None:
    if before.is_newer:
        if before.is_usable:  # as in the middle of an upgrade to a newer release
            return
        raise UsageError(str(before))
    is_new = before.revision is None
    if goes_all_the_way and not is_new and not url.startswith("sqlite"):
        _refuse_older_servers(url)
    if goes_all_the_way or is_new:
        migrations.upgrade(url)
    elif target := revisions.last_before_contracting(before.revision):
        migrations.upgrade(url, target)


def _refuse_older_servers(url: str) -> None:
    if servers := migrations.older_servers_of(url):
        raise UsageError(
            "the schema was not changed, because servers are running that can't use the new one; stop or "
            "upgrade them, then run this again:",
            *servers,
        )


def _report(url: str, migrate: Callable[[Schema], None]) -> None:
    """Run a migration, and print what it has changed and what is left to do."""
    before = migrations.schema(url)
    migrate(before)
    after = migrations.schema(url)  # the migration has imported all models, whose tables this looks for
    echo(_outcome(before, after))
    if after.missing:  # not an error: a developer changes a model before its migration exists
        echo(str(after), err=True)
    if after.is_usable and after.revision != revisions.head():
        echo(str(after))


def _outcome(before: Schema, after: Schema) -> str:
    """Return one sentence: what a migration has changed."""
    if after.revision == before.revision:
        return _no_change(after)
    if before.revision is None:
        return f"schema created at revision {after.revision}"
    if after.revision is None:
        return f"schema removed; it was at revision {before.revision}"
    return f"schema migrated from revision {before.revision} to {after.revision}"


def _no_change(schema: Schema) -> str:
    if schema.revision is None:
        return "nothing to do: the database has no schema"
    if schema.revision == revisions.head():
        return f"schema is up to date (revision {schema.revision})"
    if schema.is_usable or schema.missing:
        return "no expanding migration is pending"
    return f"nothing to do: the schema is already at revision {schema.revision}"
