"""`roster doctor`: is all there that the server needs?"""

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from errno import EADDRINUSE

import click
from sqlalchemy import func, make_url, select
from sqlalchemy.exc import DBAPIError

from service.auth.tls import expiry, server_credentials
from service.cli.environment import settings
from service.cli.migrate import missing_folder, trouble
from service.cli.terminal import UsageError, echo
from service.db import migrations
from service.db.engine import Database
from service.files import exposed, sqlite_path
from service.server import authentication
from service.settings import Settings, unknown_settings

MAX_SKEW_SECONDS = 2.0


class Diagnosis:
    """What was found, told as it is found."""

    is_well = True

    def tell(self, subject: str, wrong: str, right: str) -> None:
        """Say what is wrong with a subject, or that all is right."""
        self.is_well = self.is_well and not wrong
        mark = click.style("wrong", fg="red", bold=True) if wrong else click.style("ok   ", fg="green")
        first, *others = (wrong or right).split("\n")
        click.echo(f"{mark}  {subject:8}  ", nl=False)
        echo(first, *(" " * 17 + line for line in others))


@click.command(short_help="Look whether `roster serve` has what it needs.")
def doctor() -> None:
    """Look whether `roster serve` has what it needs: settings, files of TLS and rights, database, clock.

    The status is 0 if all is well, 1 if something is wrong.
    """
    diagnosis = Diagnosis()
    for wrong in unknown_settings():
        diagnosis.tell("settings", wrong, "")
    try:
        chosen = settings()
    except UsageError as error:
        diagnosis.tell("settings", "\n".join(error.lines), "")
    else:
        told = f"{chosen.listen}, {chosen.workers} worker" + "s" * (chosen.workers > 1)
        diagnosis.tell("settings", "", told)
        for listen in filter(None, (chosen.listen, chosen.health_listen, chosen.metrics_listen)):
            if not listen.startswith("unix:"):
                _examine_port(listen, diagnosis)
        _examine_files(chosen, diagnosis)
        file = sqlite_path(chosen.database_url)
        for danger in exposed(chosen.database_url) if chosen.is_embedded else ():
            diagnosis.tell("database", danger, "")
        if chosen.is_embedded and not file.exists():
            diagnosis.tell("database", missing_folder(chosen), f"{file} is made by `roster serve`")
        else:
            asyncio.run(_examine(chosen, diagnosis))
    sys.exit(0 if diagnosis.is_well else 1)


def _examine_port(listen: str, diagnosis: Diagnosis) -> None:
    host, _, port = listen.rpartition(":")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        # Nothing wrong beside a server that runs, which is where a doctor is called.
        in_use = error.errno == EADDRINUSE
        wrong = "" if in_use else f"can't listen on {listen}: {error.strerror}"
        diagnosis.tell("port", wrong, f"{listen} is taken: does the server run already?")


def _examine_files(chosen: Settings, diagnosis: Diagnosis) -> None:
    if chosen.tls_cert_file:
        with _told(diagnosis, "tls"):
            server_credentials(chosen)
            end = expiry(chosen.tls_cert_file)
            wrong = f"the certificate expired on {end:%Y-%m-%d}" if end < datetime.now(UTC) else ""
            diagnosis.tell("tls", wrong, f"the certificate is good until {end:%Y-%m-%d}")
    if chosen.policy_file:
        with _told(diagnosis, "rights"):
            authentication(chosen)
            diagnosis.tell("rights", "", f"{chosen.policy_file} says who may do what")


@contextmanager
def _told(diagnosis: Diagnosis, subject: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        diagnosis.tell(subject, str(error), "")


async def _examine(chosen: Settings, diagnosis: Diagnosis) -> None:
    url = make_url(chosen.database_url)
    database = Database(chosen)
    try:
        revision = await migrations.current(database.engine)
        diagnosis.tell("database", "", f"{url.set(drivername=url.get_backend_name(), query={})!r} answers")
        diagnosis.tell("schema", trouble(revision), f"revision {revision}")
        if not database.is_sqlite:
            await _count_connections(database, chosen, diagnosis)
            await _compare_clocks(database, diagnosis)
    except (DBAPIError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        diagnosis.tell("database", f"it can't be reached: {cause}; check ROSTER_DATABASE_URL", "")
    finally:
        await database.close()


async def _count_connections(database: Database, chosen: Settings, diagnosis: Diagnosis) -> None:
    async with database.read() as session:
        names = "max_connections", "superuser_reserved_connections"
        row = (await session.execute(select(*map(func.current_setting, names)))).one()
    needed = chosen.workers * (chosen.pool_size + chosen.max_overflow + chosen.bulk_connections)
    if needed > (free := int(row[0]) - int(row[1])):
        wrong = f"up to {needed} connections are opened, and it has {free}; see docs/scaling.md"
        diagnosis.tell("database", wrong, "")


async def _compare_clocks(database: Database, diagnosis: Diagnosis) -> None:
    async with database.read() as session:
        before = datetime.now(UTC)
        there = (await session.scalars(select(func.clock_timestamp()))).one()
        here = before + (datetime.now(UTC) - before) / 2
    skew = (here - there).total_seconds()
    told = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the database's"
    is_off = abs(skew) > MAX_SKEW_SECONDS
    diagnosis.tell("clock", f"it is {told}; set both by NTP" if is_off else "", told)
