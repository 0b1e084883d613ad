"""Shared by the client commands: connection options, errors, output, signals, and progress."""

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial, wraps
from pathlib import Path
from types import FrameType
from typing import Any

import click
import grpc
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.client import Disconnected, channel, tls_credentials
from service.client.errors import ProxyRefused, ProxyUnavailable
from service.errors import RosterError
from service.escape import escape
from service.settings import FOR_CLIENTS

DRAW_EVERY_SECONDS = 0.2
REPORT_EVERY_SECONDS = 5
PAGE_SIZE = 1000

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
option = partial(click.option, show_envvar=True, show_default=True)
SERVER = (
    option(
        "--address",
        envvar="ROSTER_ADDRESS",
        default="127.0.0.1:50051",
        help="Server address: host:port or unix:/path.",
    ),
    option("--tls-ca", envvar="ROSTER_TLS_CA_FILE", type=FILE, help="CA of the server, in PEM; enables TLS."),
    option("--tls-cert", envvar="ROSTER_TLS_CLIENT_CERT_FILE", type=FILE, help="Client certificate, in PEM."),
    option("--tls-key", envvar="ROSTER_TLS_CLIENT_KEY_FILE", type=FILE, help="Its private key, in PEM."),
    option(
        "--token-file",
        envvar="ROSTER_TOKEN_FILE",
        type=FILE,
        help="File with a bearer token; ROSTER_TOKEN sets the token itself.",
    ),
    # Hidden, because every user of the machine can read the arguments of a process.
    option("--token", envvar="ROSTER_TOKEN", hidden=True),
)


class Target:
    """The server that a command connects to, and the credentials to use."""

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
            ca = tls_ca.read_bytes()
            key = tls_key.read_bytes() if tls_key else None
            cert = tls_cert.read_bytes() if tls_cert else None
            self._credentials = tls_credentials(ca, key, cert, token=read_token)
        elif tls_cert or tls_key or read_token:
            raise UsageError(
                "tokens and certificates are sent over TLS only; pass the CA of the server with --tls-ca"
            )

    def channel(self) -> grpc.aio.Channel:
        return channel(self.address, self._credentials, wait_for_ready=False)

    def explain(self, failure: RosterError) -> str:
        """Return the message to print for a failed call."""
        if isinstance(failure, ProxyRefused | ProxyUnavailable):
            return f"{self.address}: {failure.message}"
        if not isinstance(failure, Disconnected):
            return failure.message
        message = f"no server answers at {self.address}"
        if self._credentials:
            return f"{message} over TLS: {failure.message}"
        return f"{message}; start one with `roster serve`, or set --address and, if it uses TLS, --tls-ca"


def server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the connection options; the command receives them as `target`."""

    @wraps(command)
    def with_target(**options: Any) -> None:
        connection = {name: options.pop(name) for name in FOR_CLIENTS.values()}
        _require_one_source(connection)
        command(target=Target(**connection), **options)

    for add in reversed(SERVER):
        with_target = add(with_target)
    return with_target


def _require_one_source(connection: Mapping[str, Any]) -> None:
    """Refuse to send the user's token, or use the user's key, for a server that only a `.env` file names."""
    source = click.get_current_context().get_parameter_source
    from_folder = {name for name in connection if source(name) is ParameterSource.DEFAULT_MAP}
    if "token_file" in from_folder and not connection["token_file"].resolve().is_relative_to(Path.cwd()):
        from_folder.remove("token_file")  # the `.env` file names it, but the secret is stored elsewhere
    token = "token_file" if connection["token_file"] else "token"
    secrets = [name for name in (token, "tls_key") if connection[name] and name not in from_folder]
    if secrets and (named := from_folder & {"address", "tls_ca"}):
        variables = [variable for variable, name in FOR_CLIENTS.items() if name in named]
        options = [f"--{name}".replace("_", "-") for name in sorted(named)]
        raise UsageError(
            f"{' and '.join(variables)} in the .env of this directory would receive a token or key that is "
            f"set elsewhere; pass {' and '.join(options)}, or set all of them in one place"
        )


class UsageError(click.ClickException):
    """An error that stops a command, with exit status 2. Each argument is one line."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n       ".join(map(escape, lines)))
        self.lines = lines


def echo(*lines: str, err: bool = False) -> None:
    """Print lines, escaped: text from elsewhere can't add lines or control the terminal."""
    click.echo("\n".join(map(escape, lines)), err=err)


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 row` or `1,000 rows`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


@contextmanager
def exit_on_signal(describe: Callable[[], str]) -> Iterator[None]:
    """Exit on SIGINT or SIGTERM, and print `interrupted` with what `describe` returns."""
    received = [int(signal.SIGINT)]

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)  # asyncio cancels its main task on SIGINT only

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        echo(f"interrupted{describe()}", err=True)
        sys.exit(128 + received[-1])  # the status that shells use


@asynccontextmanager
async def show_progress(total: int, state: Callable[[], tuple[int, str]]) -> AsyncGenerator[None]:
    """Show progress on standard error: a bar on a terminal, otherwise a line every few seconds.

    `state` returns how much of `total` is done, and a description. A total of 0 means unknown.
    """
    console = Console(stderr=True)
    task = asyncio.create_task(
        _draw_bar(console, total, state) if console.is_terminal else _print_lines(state)
    )
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _draw_bar(console: Console, total: int, state: Callable[[], tuple[int, str]]) -> None:
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


async def _print_lines(state: Callable[[], tuple[int, str]]) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_SECONDS)
        _, description = state()
        echo(description, err=True)
