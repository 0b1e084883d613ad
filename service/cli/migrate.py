"""`roster migrate`: migrate the database schema."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import click
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from service.cli.environment import read_settings
from service.cli.terminal import UsageError, echo
from service.db import migrations
from service.db.engine import Database
from service.db.errors import code_of
from service.files import sqlite_path
from service.settings import Settings

UNKNOWN_DATABASE = "3D000"  # https://www.postgresql.org/docs/current/errcodes-appendix.html


@contextmanager
def report_migration_errors(settings: Settings) -> Iterator[None]:
    """Raise UsageError if a migration fails."""
    if problem := folder_problem(settings):
        raise UsageError(problem)
    try:
        yield
    except BrokenPipeError:  # the reader of --sql has closed the pipe
        raise
    except (CommandError, DBAPIError, OSError) as error:
        if "Can't locate revision" in str(error):
            raise UsageError(
                f"{error}; a newer release created it: use that release, or downgrade with it"
            ) from None
        hint = "; create the database first, as with `createdb`" if code_of(error) == UNKNOWN_DATABASE else ""
        cause = getattr(error, "orig", None) or error
        raise UsageError(f"the schema was not changed: {cause}{hint}") from None


def folder_problem(settings: Settings) -> str:
    """Return why SQLite can't create its file, "" if it can."""
    folder = sqlite_path(settings.database_url).parent
    if settings.is_embedded and not folder.is_dir():
        return f"directory {folder} does not exist; create it first"
    return ""


def schema_problem(revision: str | None) -> str:
    """Return why this release can't use a schema at this revision, and what to do; "" if it can."""
    needed = migrations.head()
    if revision == needed:
        return ""
    if revision in (None, *migrations.revisions()):
        return (
            f"the schema is at revision {revision or 'none'}, but this release needs {needed}; "
            "run `roster migrate` with the same ROSTER_DATABASE_URL"
        )
    return (
        f"the schema is at revision {revision}, which is newer than this release, which needs {needed}; "
        f"run the newer release, or downgrade with its `roster migrate --down {needed}`"
    )


@click.command(short_help="Migrate the database schema to this release.")
@click.option("--sql", is_flag=True, help="Print the SQL without running it.")
@click.option(
    "--down", metavar="REVISION", help="Downgrade to this revision; data that it can't hold is dropped."
)
def migrate(down: str | None, *, sql: bool) -> None:
    """Migrate the schema of the database in ROSTER_DATABASE_URL to what this release needs.

    It is safe to run this more than once, and at the same time: the second run waits for the first.
    """
    settings = read_settings()
    url = settings.database_url
    known = ["base", *migrations.revisions()]
    if down and down not in known and not down.startswith("-"):
        raise UsageError(f"this release has no revision {down}; it has {', '.join(known)}")
    with report_migration_errors(settings):
        if sql:
            migrations.sql(url)
            return
        before = asyncio.run(_revision(settings))
        if down:
            migrations.downgrade(url, down)
        else:
            migrations.upgrade(url)
    after = asyncio.run(_revision(settings))
    if after == before:
        echo(f"schema is up to date (revision {after or 'none'})")
    else:
        echo(f"schema migrated from revision {before or 'none'} to {after or 'none'}")


async def _revision(settings: Settings) -> str | None:
    database = Database(settings)
    try:
        return await migrations.current(database.engine)
    finally:
        await database.close()
