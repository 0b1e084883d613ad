"""`roster doctor`: check what the server needs before it starts."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from errno import EADDRINUSE

import click
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from roster.errors import RosterError
from service.auth.tls import expiry, server_credentials
from service.cli.environment import read_settings
from service.cli.hosts import check_primary, check_replicas
from service.cli.migrate import connection_problem
from service.cli.probe import probe
from service.cli.terminal import UsageError, echo, pluralize
from service.db.engine import Database
from service.db.pooler import NEEDS_SETTING, pooler_mode
from service.db.schema import read_schema
from service.db.sqlite_files import file_dangers, sqlite_path, storage_problem
from service.scrapes import listen_on
from service.server import authentication
from service.settings import (
    Settings,
    database_warnings,
    describe_database,
    unknown_settings,
    unread_databases,
)

MAX_SKEW_SECONDS = 2.0


class Report:
    """Prints each check as it is done, and remembers whether one has failed."""

    def __init__(self) -> None:
        self.is_ok = True

    def ok(self, subject: str, text: str) -> None:
        """Print a check that has passed."""
        self._print(click.style("ok  ", fg="green"), subject, text)

    def warn(self, subject: str, text: str) -> None:
        """Print what may be wrong, without failing."""
        self._print(click.style("warn", fg="yellow"), subject, text)

    def fail(self, subject: str, problem: str) -> None:
        """Print a check that has failed."""
        self.is_ok = False
        self._print(click.style("FAIL", fg="red", bold=True), subject, problem)

    def check(self, subject: str, problem: str, text: str) -> None:
        """Print the problem, or if there is none, the text."""
        if problem:
            self.fail(subject, problem)
        else:
            self.ok(subject, text)

    @contextmanager
    def failures_of(self, subject: str) -> Iterator[None]:
        """Print an OSError as a failed check."""
        try:
            yield
        except OSError as error:
            self.fail(subject, str(error))

    @staticmethod
    def _print(mark: str, subject: str, text: str) -> None:
        first, *others = text.split("\n")
        click.echo(f"{mark}  {subject:8}  ", nl=False)
        echo(first, *(" " * 16 + line for line in others))


@click.command()
@click.option(
    "--database",
    "only_probes",
    is_flag=True,
    help="Instead, try what Roster needs from the database, in a scratch schema that is dropped at the end.",
)
def doctor(*, only_probes: bool) -> None:
    """Check that `roster serve` can run: settings, ports, TLS and policy files, pooler, database, schema,
    clock, replicas.

    The settings are those of `roster serve --help`. Nothing is changed. The exit status is 0 if no check
    fails, otherwise 1; a warning is not a failure.

    With --database, it connects as `roster migrate` does, and needs a role that may create a schema.
    """
    report = Report()
    for unknown in unknown_settings():
        report.fail("settings", unknown)
    try:
        settings = read_settings()
    except UsageError as error:
        report.fail("settings", "\n".join(error.lines))
    else:
        for unread in unread_databases(settings):
            report.fail("settings", unread)
        if report.is_ok:
            report.ok("settings", f"{settings.listen}, {pluralize(settings.workers, 'worker')}")
        if only_probes:
            asyncio.run(probe(settings, report))
        else:
            _check(settings, report)
    sys.exit(0 if report.is_ok else 1)


def _check(settings: Settings, report: Report) -> None:
    for listen in filter(None, (settings.listen, settings.health_listen, settings.metrics_listen)):
        if not listen.startswith("unix:"):
            _check_port(listen, report)
    _check_files(settings, report)
    for warning in database_warnings(settings):
        report.warn("database", warning)
    if settings.is_embedded:
        for danger in file_dangers(settings.database_url):
            report.fail("database", danger)
        file, problem = sqlite_path(settings.database_url), storage_problem(settings.database_url)
        if problem:
            report.fail("database", problem)
            return
        if not file.exists():  # to connect would create it
            report.ok("database", f"`roster serve` will create {file}")
            return
    asyncio.run(_check_database(settings, report))


def _check_port(listen: str, report: Report) -> None:
    host, _, port = listen.rpartition(":")
    try:
        listen_on(host.strip("[]"), int(port)).close()
    except OSError as error:
        # Not a failure: people run this next to the running server.
        if error.errno == EADDRINUSE:
            report.warn("port", f"{listen} is in use, maybe by the running server")
        else:
            report.fail("port", f"can't listen on {listen}: {error.strerror}")


def _check_files(settings: Settings, report: Report) -> None:
    if settings.tls_cert_file:
        with report.failures_of("tls"):
            server_credentials(settings)
            end = expiry(settings.tls_cert_file)
            problem = f"the certificate expired on {end:%Y-%m-%d}" if end < datetime.now(UTC) else ""
            report.check("tls", problem, f"the certificate is valid until {end:%Y-%m-%d}")
    if settings.policy_file:
        with report.failures_of("policy"):
            authentication(settings)
            report.ok("policy", f"{settings.policy_file} is valid")


async def _check_database(settings: Settings, report: Report) -> None:
    database = Database(settings)
    try:
        if not database.is_sqlite and not await _check_pooler(settings, report):
            return
        schema = await read_schema(database.engine)
        report.ok("database", f"connected to {describe_database(settings.database_url)}")
        report.check("schema", "" if schema.is_usable else str(schema), str(schema))
        if not database.is_sqlite:
            if not settings.pools_transactions:  # whose pooler limits the connections of PostgreSQL
                await _check_connections(database, settings, report)
            await _check_clock(database, report)
            await check_primary(settings, report)
            await check_replicas(database, settings, report)
    except (DBAPIError, OSError, RosterError) as error:
        report.fail("database", connection_problem(error))
    finally:
        await database.close()


async def _check_pooler(settings: Settings, report: Report) -> bool:
    """Return whether Roster can use the database as it is set; if not, nothing else can be checked."""
    mode = await pooler_mode(settings.database_url, settings.connect_timeout)
    if mode == "transaction" and not settings.pools_transactions:
        report.fail("pooler", NEEDS_SETTING)
        return False
    if mode == "transaction":
        report.ok("pooler", "in transaction mode; max_client_conn must admit all connections of all servers")
        if settings.migration_url is None:
            report.warn("pooler", "`roster migrate` needs ROSTER_MIGRATION_URL, the URL of PostgreSQL itself")
    elif settings.pools_transactions:
        found = "the connection is direct" if mode == "none" else "the pooler is in session mode"
        report.warn(
            "pooler",
            f"{found}: ROSTER_DATABASE_POOLER={mode} saves several round trips per call",
        )
    elif mode == "session":
        report.ok(
            "pooler",
            f"in session mode; its pool needs {_connections(settings)} connections for this server",
        )
    return True


def _connections(settings: Settings) -> int:
    """Return how many connections the server may open."""
    return settings.workers * (settings.pool_size + settings.max_overflow + settings.bulk_connections)


async def _check_connections(database: Database, settings: Settings, report: Report) -> None:
    names = "max_connections", "superuser_reserved_connections"
    async with database.read() as session:
        row = (await session.execute(select(*map(func.current_setting, names)))).one()
    available = int(row[0]) - int(row[1])
    needed = _connections(settings)
    if needed > available:
        report.fail(
            "database",
            f"the server may open {needed} connections, but the database allows {available}; "
            "see docs/scaling.md",
        )


async def _check_clock(database: Database, report: Report) -> None:
    async with database.read() as session:
        before = datetime.now(UTC)
        database_time = (await session.scalars(select(func.clock_timestamp()))).one()
        local_time = before + (datetime.now(UTC) - before) / 2
    skew = (local_time - database_time).total_seconds()
    direction = "ahead of" if skew > 0 else "behind"
    text = f"{abs(skew):.1f} s {direction} the database"
    problem = f"{text}; synchronize both with NTP" if abs(skew) > MAX_SKEW_SECONDS else ""
    report.check("clock", problem, text)
