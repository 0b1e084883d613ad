"""What the commands share that are clients of a server: its address, its errors, how far they are."""

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
import grpc
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.client import Disconnected, channel, tls_credentials
from service.errors import RosterError
from service.escape import escape
from service.settings import FOR_CLIENTS

DRAW_EVERY_SECONDS = 0.2
REPORT_EVERY_SECONDS = 5
PAGE_SIZE = 1000

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
option = partial(click.option, show_envvar=True, show_default=True)
SERVER = (
    option("--address", envvar="ROSTER_ADDRESS", default="127.0.0.1:50051", help="host:port or unix:/path."),
    option("--tls-ca", envvar="ROSTER_TLS_CA_FILE", type=FILE, help="CA of the server, in PEM; means TLS."),
    option("--tls-cert", envvar="ROSTER_TLS_CLIENT_CERT_FILE", type=FILE, help="Own certificate, in PEM."),
    option("--tls-key", envvar="ROSTER_TLS_CLIENT_KEY_FILE", type=FILE, help="Its private key, in PEM."),
    option("--token-file", envvar="ROSTER_TOKEN_FILE", type=FILE, help="Bearer token; or set ROSTER_TOKEN."),
    # As an argument everybody on the machine could see it.
    option("--token", envvar="ROSTER_TOKEN", hidden=True),
)


class Target:
    """The server that a command is a client of, and how to get in there."""

    def __init__(
        self,
        address: str,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        token_file: Path | None,
        token: str | None,
    ) -> None:
        self.address = address
        self._credentials = None
        read_token: Callable[[], str] | None = None
        if token_file:
            read_token = lambda: token_file.read_text().strip()  # noqa: E731
        elif token:
            read_token = lambda: token  # noqa: E731
        if tls_ca:
            ca, key, cert = (path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_cert))
            self._credentials = tls_credentials(ca, key, cert, token=read_token)
        elif tls_cert or tls_key or read_token:
            raise UsageError("a token or certificate is sent over TLS only; --tls-ca names the server's CA")

    def channel(self) -> grpc.aio.Channel:
        return channel(self.address, self._credentials, is_patient=False)

    def explained(self, failure: RosterError) -> str:
        """Return a sentence about a call that failed before anything was done."""
        if not isinstance(failure, Disconnected):
            return failure.message
        told = f"no server answers at {self.address}"
        if self._credentials:
            return f"{told} with the TLS that was asked for: {failure.message}"
        named = "name it with --address or ROSTER_ADDRESS, and its CA with --tls-ca"
        return f"{told}; start one with `roster serve`, or {named}"


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a client; the command gets them as its `target`."""

    @wraps(command)
    def with_target(**options: Any) -> None:
        chosen = {name: options.pop(name) for name in FOR_CLIENTS.values()}
        _require_one_source(chosen)
        command(target=Target(**chosen), **options)

    for add in reversed(SERVER):
        with_target = add(with_target)
    return with_target


def _require_one_source(chosen: Mapping[str, Any]) -> None:
    """Refuse to send a token or use a key of one's own where only the current folder's `.env` says to."""
    source = click.get_current_context().get_parameter_source
    from_folder = {name for name in chosen if source(name) is ParameterSource.DEFAULT_MAP}
    if "token_file" in from_folder and not chosen["token_file"].resolve().is_relative_to(Path.cwd()):
        from_folder.remove("token_file")  # the secret itself is not the folder's
    token = "token_file" if chosen["token_file"] else "token"
    secrets = [name for name in (token, "tls_key") if chosen[name] and name not in from_folder]
    if secrets and (named := from_folder & {"address", "tls_ca"}):
        variables = [variable for variable, name in FOR_CLIENTS.items() if name in named]
        options = [f"--{name}".replace("_", "-") for name in sorted(named)]
        raise UsageError(
            f"{' and '.join(variables)} in the .env of this folder would get a token or key from elsewhere; "
            f"add {' and '.join(options)}, or keep all of them in one place"
        )


class UsageError(click.ClickException):
    """An error that keeps a command from running or from finishing; each text is one line."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n       ".join(map(escape, lines)))
        self.lines = lines


def echo(*lines: str, err: bool = False) -> None:
    """Print lines for people; each stays on its line, and controls no terminal, whoever wrote it."""
    click.echo("\n".join(map(escape, lines)), err=err)


def counted(number: int, noun: str) -> str:
    """Return how many there are of something."""
    return f"{number:,} {noun}" + "s" * (number != 1)


@contextmanager
def stoppable(told: Callable[[], str]) -> Iterator[None]:
    """End the command at SIGINT or SIGTERM, and say then how far it is."""
    received = [int(signal.SIGINT)]

    def terminate(number: int, _: Any) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)  # asyncio knows how to end for that one

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        echo(f"interrupted{told()}", err=True)
        sys.exit(128 + received[-1])  # as shells have it


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
    columns = (
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total or None)
        while True:
            done, description = state()
            bar.update(task, completed=done, description=description)
            await asyncio.sleep(DRAW_EVERY_SECONDS)


async def _lines(state: Callable[[], tuple[int, str]]) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_SECONDS)
        echo(state()[1], err=True)
