"""The progress of a command, on standard error.

Apart from `terminal`, because every command imports that, and only these need rich.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from service.cli.terminal import echo

DRAW_EVERY_SECONDS = 0.2
REPORT_EVERY_SECONDS = 5
WIDTH_FOR_TIME, WIDTH_FOR_BAR, WIDTH_FOR_BOTH_TIMES = 60, 72, 90


@asynccontextmanager
async def show_progress(
    total: int, state: Callable[[], tuple[int, str]], *, draws: bool = True
) -> AsyncGenerator[None]:
    """Show progress on standard error: a bar on a terminal, otherwise a line every few seconds.

    `state` returns how much of `total` is done, and a description. A total of 0 means unknown. Without
    `draws` there is no bar: something else may write to the terminal.
    """
    console = Console(stderr=True)
    is_bar = draws and console.is_terminal
    task = asyncio.create_task(_draw_bar(console, total, state) if is_bar else _print_lines(state))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _draw_bar(console: Console, total: int, state: Callable[[], tuple[int, str]]) -> None:
    with Progress(*_bar_columns(console.width), console=console, transient=True) as bar:
        task = bar.add_task("", total=total or None)
        while True:
            done, description = state()
            bar.update(task, completed=done, description=description)
            await asyncio.sleep(DRAW_EVERY_SECONDS)


def _bar_columns(width: int) -> list[ProgressColumn]:
    """Return the columns that fit; the bar takes the rest, and a description that is too long is cut."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    ]
    if width >= WIDTH_FOR_BAR:
        columns.insert(0, BarColumn(bar_width=None))
    if width >= WIDTH_FOR_BOTH_TIMES:
        columns.append(TimeElapsedColumn(table_column=Column(no_wrap=True)))
    if width >= WIDTH_FOR_TIME:
        columns.append(TimeRemainingColumn(table_column=Column(no_wrap=True)))
    return columns


async def _print_lines(state: Callable[[], tuple[int, str]]) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_SECONDS)
        _, description = state()
        echo(description, err=True)
