"""`roster serve`: run the server until it is told to stop."""

import asyncio
import gc
import logging
import signal
import sys
from functools import partial

import click
import uvloop
from sqlalchemy.exc import DBAPIError

from service import logs, workers
from service.cli.environment import settings, settings_help
from service.cli.migrate import reported, trouble
from service.cli.terminal import UsageError, echo
from service.connections import raise_file_limit
from service.db import migrations
from service.db.engine import Database
from service.db.errors import code_of
from service.files import exposed
from service.server import Server
from service.settings import Settings, is_local, unknown_settings

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
USERS = "roster.v1.UserService"
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 5.0
REFUSED = ("28", "3D")  # SQLSTATE: a role, a password or a database that waiting doesn't mend


@click.command(short_help="Run the server until it gets SIGTERM or SIGINT.", epilog=settings_help())
@click.option("--worker", "is_worker", is_flag=True, hidden=True)
def serve(*, is_worker: bool) -> None:
    """Run the server until it gets SIGTERM or SIGINT; calls in flight are finished first."""
    chosen = settings()
    logs.configure(chosen.log_level, chosen.log_format)
    raise_file_limit(chosen)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for unknown in [] if is_worker else unknown_settings():
        log.warning(unknown)
    if chosen.is_embedded:
        with reported(chosen):
            migrations.upgrade(chosen.database_url)
        for danger in exposed(chosen.database_url):
            log.warning("%s", danger)
    try:
        sys.exit(uvloop.run(_run(chosen, is_worker=is_worker)))
    except OSError as error:
        raise UsageError(str(error)) from None


async def _run(chosen: Settings, *, is_worker: bool) -> int:
    stopping, loop = workers.Stop(), asyncio.get_running_loop()
    supervises = chosen.workers > 1 and not is_worker

    def stop() -> None:
        stopping.asked.set()
        for number in SIGNALS:  # a second one ends it at once, with its workers
            loop.remove_signal_handler(number)
            if supervises:
                loop.add_signal_handler(number, stopping.forced.set)
        if is_worker:
            loop.remove_reader(sys.stdin)
        else:
            echo("stopping: no new calls, those in flight are finished", err=True)

    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    if is_worker:
        loop.add_reader(sys.stdin, stop)
    if supervises:
        return await workers.supervise(chosen, stopping, partial(_announce, chosen))
    await _serve(chosen, stopping.asked, is_worker=is_worker)
    return 0


async def _serve(chosen: Settings, stopping: asyncio.Event, *, is_worker: bool) -> None:
    server = Server(chosen)
    try:
        await _require_schema(server.database, chosen.database_wait, stopping)
        if not stopping.is_set():
            await server.start()
            # What is loaded by now stays. To look through it again with every few messages took 0.6 of the
            # 6 µs that a row of a bulk stream cost; to look through the 5,000 rows of each message, 0.3 more.
            gc.freeze()
            gc.set_threshold(20_000)
            if is_worker:
                echo("serving")
            else:
                _announce(chosen, server.address)
        await stopping.wait()
    finally:
        await server.stop(None if server.address and stopping.is_set() else 0)


async def _require_schema(database: Database, patience: float, stopping: asyncio.Event) -> None:
    """Wait for the database, and look whether its schema is this release's; raises UsageError."""
    loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_SECONDS
    end = loop.time() + patience
    while not stopping.is_set():
        try:
            if wrong := trouble(await migrations.current(database.engine)):
                raise UsageError(wrong)
        except (DBAPIError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            if code_of(error).startswith(REFUSED) or loop.time() + pause > end:
                told = f"the database can't be reached: {cause}; check ROSTER_DATABASE_URL"
                raise UsageError(told) from None
            log.warning("the database can't be reached: %s; trying again in %g s", cause, pause)
        else:
            return
        await asyncio.wait([asyncio.ensure_future(stopping.wait())], timeout=pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _announce(chosen: Settings, address: str) -> None:
    echo(f"listening on {address}", err=True)
    if chosen.insecure and not is_local(chosen.listen):
        log.warning("ROSTER_INSECURE: whoever reaches %s may read, change and delete everything", address)
    is_read = sys.stderr.isatty() if chosen.log_format == "auto" else chosen.log_format == "text"
    if chosen.tls_cert_file or chosen.policy_file or not is_read:
        return
    ada = '{"user": {"email": "ada@example.org"}}'
    echo(
        "try, in another terminal:",
        f"  grpcurl -plaintext {address} list",
        f"  grpcurl -plaintext -d '{ada}' {address} {USERS}/CreateUser",
        f"  grpcurl -plaintext {address} {USERS}/ListUsers",
        err=True,
    )
