"""`roster migrate`: bring the database's schema to what this release needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from service.cli.environment import settings
from service.cli.terminal import UsageError
from service.db import migrations


@contextmanager
def reported() -> Iterator[None]:
    """Tell in one line what kept a migration from being done."""
    try:
        yield
    except (CommandError, DBAPIError, OSError) as error:
        raise UsageError(f"the schema was left as it was: {getattr(error, 'orig', None) or error}") from None


@click.command()
@click.option("--sql", is_flag=True, help="Print the SQL, for a DBA to run, and run none of it.")
@click.option("--down", metavar="REVISION", help="Go back to this revision; drops the data it did not have.")
def migrate(down: str | None, *, sql: bool) -> None:
    """Bring the database's schema to what this release needs.

    ROSTER_DATABASE_URL names the database. Of two runs at once the second waits for the first.
    """
    url = settings().database_url
    with reported():
        if sql:
            migrations.sql(url)
        elif down:
            migrations.downgrade(url, down)
        else:
            migrations.upgrade(url)
    if not sql:
        click.echo(f"the schema is at revision {down or migrations.head()}")
