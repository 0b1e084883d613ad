"""`roster serve`: run the server until a signal stops it."""

import asyncio
import logging
import signal
import sys
from functools import partial

import click
import uvloop
from sqlalchemy.exc import DBAPIError

from service import logs, workers
from service.auth.tls import exposure
from service.cli.environment import CommandWithSettings, read_settings
from service.cli.migrate import connection_problem, report_migration_errors
from service.cli.terminal import UsageError, echo
from service.connections import raise_file_limit
from service.db import migrations, revisions
from service.db.engine import Database
from service.db.errors import cause_of, is_transient
from service.db.pooler import pooler_problem, replica_problem
from service.db.schema import Schema, read_schema
from service.db.sqlite_files import file_dangers
from service.memory import collect_rarely
from service.server import Server
from service.settings import (
    Settings,
    database_warnings,
    describe_database,
    unknown_settings,
    unread_databases,
)

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
USERS = "roster.v1.UserService"
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 5.0
MIN_ATTEMPT_SECONDS = 15  # also with ROSTER_DATABASE_WAIT=0; a URL can set no limit of its own


@click.command(cls=CommandWithSettings)
@click.option("--worker", "is_worker", is_flag=True, hidden=True)
def serve(*, is_worker: bool) -> None:
    """Run the server until SIGTERM or SIGINT. Calls in flight are finished before it exits."""
    settings = read_settings()
    logs.configure(settings.log_level, settings.log_format)
    raise_file_limit(settings)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not is_worker:
        echo(f"database: {describe_database(settings.database_url)}", err=True)
        for warning in (*unknown_settings(), *unread_databases(settings), *database_warnings(settings)):
            log.warning(warning)
    if settings.is_embedded:
        with report_migration_errors(settings):
            schema = migrations.schema(settings.direct_url)
            if not (schema.is_newer or schema.revision == revisions.head()):
                migrations.upgrade(settings.direct_url)
        for danger in file_dangers(settings.database_url):
            log.warning("%s", danger)
    try:
        sys.exit(uvloop.run(_run(settings, is_worker=is_worker)))
    except OSError as error:
        raise UsageError(str(error)) from None


async def _run(settings: Settings, *, is_worker: bool) -> int:
    stopping, loop = workers.Stop(), asyncio.get_running_loop()
    supervises = settings.workers > 1 and not is_worker

    def stop() -> None:
        stopping.asked.set()
        for number in SIGNALS:  # a second signal ends the process at once, with its workers
            loop.remove_signal_handler(number)
            if supervises:
                loop.add_signal_handler(number, stopping.forced.set)
        if is_worker:
            loop.remove_reader(sys.stdin)
        else:
            echo("stopping: new calls are refused, calls in flight are finished", err=True)

    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    if is_worker:
        # The supervisor stops a worker by closing its standard input, also when the supervisor dies.
        loop.add_reader(sys.stdin, stop)
    if supervises:
        return await workers.supervise(settings, stopping, partial(_announce, settings))
    await _serve(settings, stopping.asked, is_worker=is_worker)
    return 0


async def _serve(settings: Settings, stopping: asyncio.Event, *, is_worker: bool) -> None:
    server = Server(settings)
    try:
        await _wait_for_schema(server.database, settings, stopping)
        if not stopping.is_set():
            # Before the first connection to a replica, which would leave its settings in a pooler's session.
            if problem := await replica_problem(settings):
                raise UsageError(problem)
            await server.start()
            collect_rarely()
            if is_worker:
                echo("serving")
            else:
                _announce(settings, server.address)
        await stopping.wait()
    finally:
        await server.stop(None if server.address and stopping.is_set() else 0)


async def _wait_for_schema(database: Database, settings: Settings, stopping: asyncio.Event) -> None:
    """Wait for the database, and check that its schema fits this release; raises UsageError."""
    loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_SECONDS
    end = loop.time() + settings.database_wait
    while not stopping.is_set():
        try:
            seconds = max(end - loop.time(), MIN_ATTEMPT_SECONDS)
            schema = await workers.unless(stopping, _read_schema(database, settings), seconds)
            if schema is None and not stopping.is_set():
                raise ConnectionError("the database did not answer in time")
        except (DBAPIError, OSError) as error:
            if not is_transient(error) or loop.time() + pause > end:
                raise UsageError(connection_problem(error)) from None
            log.warning("the database can't be used: %s; trying again in %g s", cause_of(error), pause)
        else:
            if schema is not None:
                _check_schema(schema)
            return
        await asyncio.wait([asyncio.ensure_future(stopping.wait())], timeout=pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


async def _read_schema(database: Database, settings: Settings) -> Schema:
    # First the pooler: in the wrong mode, settings of this server would be left in sessions of others.
    if not settings.is_embedded and (problem := await pooler_problem(settings)):
        raise UsageError(problem)
    return await read_schema(database.engine)


def _check_schema(schema: Schema) -> None:
    if not schema.is_usable:
        raise UsageError(str(schema))
    log.info("%s", schema)


def _announce(settings: Settings, address: str) -> None:
    echo(f"listening on {address}", err=True)
    if danger := exposure(settings):
        log.warning("ROSTER_INSECURE: %s", danger.format(address))
    is_secured = settings.tls_cert_file or settings.policy_file
    if is_secured or not _is_read_by_people(settings.log_format):
        return
    ada = '{"user": {"email": "ada@example.org"}}'
    echo(
        "try in another terminal:",
        f"  grpcurl -plaintext {address} list",
        f"  grpcurl -plaintext -d '{ada}' {address} {USERS}/CreateUser",
        f"  grpcurl -plaintext {address} {USERS}/ListUsers",
        err=True,
    )


def _is_read_by_people(log_format: str) -> bool:
    return sys.stderr.isatty() if log_format == "auto" else log_format == "text"
