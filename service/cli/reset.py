"""`roster changes reset`: begin a new feed of changes."""

import asyncio

from sqlalchemy.exc import DBAPIError

from roster.errors import RosterError
from service.changes.reset import reset_feed
from service.cli.environment import read_settings
from service.cli.migrate import connection_problem
from service.cli.terminal import UsageError, echo
from service.db import migrations
from service.db.engine import Database
from service.db.sqlite_files import sqlite_path, storage_problem
from service.settings import Settings, describe_database, unread_databases

OUTCOME = (
    "a new feed has begun, and the log of changes is empty; users and posts were not changed",
    "tokens made before are refused as FEED_RESET, and watches that are running end with it",
    "each consumer must now make a new copy from an export; docs/changes.md says how",
)


def reset_database() -> None:
    """Begin a new feed in the database of the settings, and print what this means; raises UsageError."""
    settings = read_settings()
    for unread in unread_databases(settings):
        echo(f"warning: {unread}", err=True)
    if settings.is_embedded:
        _require_file(settings.database_url)
    try:
        schema = migrations.schema(settings.database_url)
        if not schema.is_usable:
            raise UsageError(str(schema))
        asyncio.run(_reset(settings))
    except (RosterError, DBAPIError, OSError) as error:
        raise UsageError(f"the feed was not reset: {connection_problem(error)}") from None
    echo(f"database: {describe_database(settings.database_url)}", *OUTCOME)


def _require_file(url: str) -> None:
    """Raise UsageError unless SQLite's file exists and can be written; to connect would create it."""
    if problem := storage_problem(url):
        raise UsageError(problem)
    if not (file := sqlite_path(url).absolute()).exists():
        raise UsageError(f"{file} does not exist; set ROSTER_DATABASE_URL to the database of the servers")


async def _reset(settings: Settings) -> None:
    database = Database(settings)
    try:
        await reset_feed(database, is_forced=True)
    finally:
        await database.close()
