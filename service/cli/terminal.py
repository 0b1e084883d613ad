"""What the commands share that are clients of a server: its address, its errors, how far they are."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.client import Disconnected
from service.errors import RosterError

DRAW_EVERY_SECONDS = 0.2
REPORT_EVERY_SECONDS = 5
PAGE_SIZE = 1000
INTERRUPTED = 130  # the status of a command that got SIGINT

address_option = click.option(
    "--address", envvar="ROSTER_ADDRESS", default="127.0.0.1:50051", help="host:port or unix:/path."
)


def explained(failure: RosterError, address: str) -> str:
    """Return a sentence about a call that failed before anything was done."""
    if isinstance(failure, Disconnected):
        return f"no server answers at {address}; start one with `roster serve`, or name it with --address"
    return failure.message


class UsageError(click.ClickException):
    """What keeps a command from running, or from coming to its end."""

    exit_code = 2


@asynccontextmanager
async def progress(total: int, state: Callable[[], tuple[int, str]]) -> AsyncGenerator[None]:
    """Show meanwhile how far a command is, on standard error: a bar on a terminal, otherwise some lines.

    `state` returns how much of `total` is done, and a text. A total of 0 is one that nobody knows.
    """
    console = Console(stderr=True)
    task = asyncio.create_task(_bar(console, total, state) if console.is_terminal else _lines(state))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _bar(console: Console, total: int, state: Callable[[], tuple[int, str]]) -> None:
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total or None)
        while True:
            done, text = state()
            bar.update(task, completed=done, description=text)
            await asyncio.sleep(DRAW_EVERY_SECONDS)


async def _lines(state: Callable[[], tuple[int, str]]) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_SECONDS)
        click.echo(state()[1], err=True)
