"""`roster migrate`: bring the database's schema to what this release needs."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import click
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from service.cli.environment import settings
from service.cli.terminal import UsageError, echo
from service.db import migrations
from service.db.engine import Database
from service.db.errors import code_of
from service.files import sqlite_path
from service.settings import Settings

UNKNOWN_DATABASE = "3D000"  # https://www.postgresql.org/docs/current/errcodes-appendix.html


@contextmanager
def reported(chosen: Settings) -> Iterator[None]:
    """Tell in one line what kept a migration from being done."""
    if wrong := missing_folder(chosen):
        raise UsageError(wrong)
    try:
        yield
    except BrokenPipeError:  # whoever reads has enough
        raise
    except (CommandError, DBAPIError, OSError) as error:
        if "Can't locate revision" in str(error):
            raise UsageError(f"{error}; a newer release has it, so use that, or go back with it") from None
        hint = "; make it first, as `createdb` does" if code_of(error) == UNKNOWN_DATABASE else ""
        told = getattr(error, "orig", None) or error
        raise UsageError(f"the schema was left as it was: {told}{hint}") from None


def missing_folder(chosen: Settings) -> str:
    """Return what is wrong with the place of SQLite's file; "" where nothing is."""
    folder = sqlite_path(chosen.database_url).parent
    return f"there is no folder {folder}; make it first" if chosen.is_embedded and not folder.is_dir() else ""


def trouble(revision: str | None) -> str:
    """Return what is wrong with a schema at this revision, and what to do; "" where it is this release's."""
    needed = migrations.head()
    if revision == needed:
        return ""
    if revision in (None, *migrations.revisions()):
        return (
            f"the schema is at revision {revision or 'none'}, this release needs {needed}; "
            "run `roster migrate` with the same ROSTER_DATABASE_URL"
        )
    return (
        f"the schema is at revision {revision}, which is newer than this release, that needs {needed}; "
        f"run the newer release, or go back with its `roster migrate --down {needed}`"
    )


@click.command()
@click.option("--sql", is_flag=True, help="Print the SQL, for a DBA to run, and run none of it.")
@click.option("--down", metavar="REVISION", help="Go back to this revision; drops the data it did not have.")
def migrate(down: str | None, *, sql: bool) -> None:
    """Bring the database's schema to what this release needs.

    ROSTER_DATABASE_URL names the database. Of two runs at once the second waits for the first.
    """
    chosen = settings()
    url = chosen.database_url
    known = ["base", *migrations.revisions()]
    if down and down not in known and not down.startswith("-"):
        raise UsageError(f"this release has no revision {down}; it has {', '.join(known)}")
    with reported(chosen):
        before = None if sql else asyncio.run(_revision(chosen))
        if sql:
            migrations.sql(url)
        elif down:
            migrations.downgrade(url, down)
        else:
            migrations.upgrade(url)
    if not sql:
        after = asyncio.run(_revision(chosen))
        did = "nothing was to be done" if after == before else f"migrated from {before or 'none'}"
        echo(f"{did}: the schema is at revision {after or 'none'}")


async def _revision(chosen: Settings) -> str | None:
    database = Database(chosen)
    try:
        return await migrations.current(database.engine)
    finally:
        await database.close()
