"""`roster serve`: run the server until it is told to stop."""

import asyncio
import gc
import logging
import signal

import click
import uvloop
from sqlalchemy.exc import DBAPIError

from service.cli.environment import settings, settings_help
from service.cli.migrate import reported
from service.cli.terminal import UsageError
from service.db import migrations
from service.db.engine import Database
from service.server import Server
from service.settings import Settings

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
USERS = "roster.v1.UserService"


@click.command(epilog=settings_help())
def serve() -> None:
    """Run the server until it gets SIGTERM or SIGINT; calls in flight are finished first."""
    chosen = settings()
    logging.basicConfig(level=chosen.log_level, format=LOG_FORMAT)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if chosen.is_embedded:
        with reported():
            migrations.upgrade(chosen.database_url)
    try:
        uvloop.run(_serve(chosen))
    except OSError as error:
        raise UsageError(str(error)) from None


async def _serve(chosen: Settings) -> None:
    stopping = asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    server = Server(chosen)
    try:
        await _require_schema(server.database)
        await server.start()
        # What is loaded by now stays. To look through it again with every few messages took 0.6 of the
        # 6 µs that a row of a bulk stream costs here.
        gc.freeze()
        _announce(server.address)
        await stopping.wait()
        for number in SIGNALS:  # a second one ends it at once
            asyncio.get_running_loop().remove_signal_handler(number)
        click.echo("stopping: no new calls, those in flight are finished", err=True)
    finally:
        await server.stop()


async def _require_schema(database: Database) -> None:
    try:
        current = await migrations.current(database.engine)
    except (DBAPIError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        raise UsageError(f"the database can't be reached: {cause}; check ROSTER_DATABASE_URL") from None
    if current != migrations.head():
        raise UsageError(
            f"the schema is at revision {current or 'none'}, this release needs {migrations.head()}; "
            "run `roster migrate` with the same ROSTER_DATABASE_URL"
        )


def _announce(address: str) -> None:
    ada = '{"user": {"email": "ada@example.org"}}'
    click.echo(
        f"listening on {address}\n"
        "try, in another terminal:\n"
        f"  grpcurl -plaintext {address} list\n"
        f"  grpcurl -plaintext -d '{ada}' {address} {USERS}/CreateUser\n"
        f"  grpcurl -plaintext {address} {USERS}/ListUsers",
        err=True,
    )
