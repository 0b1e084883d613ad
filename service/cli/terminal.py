"""Shared by the client commands: connection options, errors, output, and signals."""

import os
import re
import shutil
import signal
import ssl
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click
import grpc
from click.core import ParameterSource

from roster.client import Consistency, Disconnected, channel, local_credentials, tls_credentials
from roster.client.address import check_address
from roster.client.causes import no_server
from roster.client.errors import ProxyRefused, ProxyUnavailable
from roster.errors import RosterError, Unauthenticated
from service.cli.diagnosis import Tls, diagnose
from service.cli.refusal import explain_refusal
from service.escape import escape
from service.variables import FOR_CLIENTS, clean, is_local

PAGE_SIZE = 1000
NAME_WIDTH = 40  # columns of a text in a question

# Options that decide who receives a token.
DESTINATION = {"address", "tls_ca", "tls_server_name", "insecure_token"}

HEADER = re.compile(r"[\x20-\x7e]*")  # what gRPC sends as the value of a header


class CleanOption(click.Option):
    """An option whose variable is read as those of settings are: without white space and quotes."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        return clean(value) or None if value else None


FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
option = partial(click.option, cls=CleanOption, show_envvar=True, show_default=True)
SERVER = (
    option(
        "--address",
        envvar="ROSTER_ADDRESS",
        default="127.0.0.1:50051",
        help="Server address: host:port or unix:/path.",
    ),
    option("--tls-ca", envvar="ROSTER_TLS_CA_FILE", type=FILE, help="CA of the server, in PEM; enables TLS."),
    option(
        "--tls-server-name",
        envvar="ROSTER_TLS_SERVER_NAME",
        help="Name in the server's certificate, if it is not the host of the address, as with a tunnel.",
    ),
    option("--tls-cert", envvar="ROSTER_TLS_CLIENT_CERT_FILE", type=FILE, help="Client certificate, in PEM."),
    option(
        "--tls-key",
        envvar="ROSTER_TLS_CLIENT_KEY_FILE",
        type=FILE,
        help="Private key of the client certificate, in PEM.",
    ),
)
TOKEN_FILE = "--token-file"  # noqa: S105  (the name of an option)
TOKEN = (
    # Hidden, because every user of the machine can read the arguments of a process.
    option("--token", envvar="ROSTER_TOKEN", hidden=True),
    click.option(
        "--insecure-token",
        cls=CleanOption,
        envvar="ROSTER_INSECURE_TOKEN",
        show_envvar=True,
        is_flag=True,
        help="Send the token without TLS, to this machine only: for a sidecar or tunnel that adds TLS.",
    ),
)


def _token_file(name: str) -> Any:
    return option(
        name,
        "token_file",
        envvar="ROSTER_TOKEN_FILE",
        type=FILE,
        help="File with a bearer token; ROSTER_TOKEN sets the token itself.",
    )


class Target:
    """The server that a command connects to, and the credentials to use; raises UsageError.

    A token is sent in plain text only with `insecure_token`, and only to this machine.
    """

    def __init__(
        self,
        address: str,
        tls_ca: Path | None,
        tls_server_name: str | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        token_file: Path | None,
        token: str | None,
        *,
        insecure_token: bool,
        token_option: str = TOKEN_FILE,
    ) -> None:
        try:
            self.address = check_address(address)
        except ValueError as error:
            raise UsageError(f"--address {error}") from None
        read_token: Callable[[], str] | None = None
        if token_file:
            read_token = lambda: token_file.read_text().strip()  # noqa: E731
        elif token:
            read_token = lambda: token  # noqa: E731
        self._read_token = read_token
        self._token_option = token_option
        self._token_source = str(token_file or "ROSTER_TOKEN")
        self._server_name = tls_server_name
        self._tls: Tls | None = None
        self._credentials: grpc.ChannelCredentials | None = None
        if tls_ca:
            context = _tls_context(tls_ca, tls_cert, tls_key)
            self._tls = Tls(context, tls_server_name, has_certificate=bool(tls_cert))
            key = tls_key.read_bytes() if tls_key else None
            cert = tls_cert.read_bytes() if tls_cert else None
            self._credentials = tls_credentials(tls_ca.read_bytes(), key, cert, token=read_token)
        elif tls_cert or tls_key or tls_server_name:
            raise UsageError(
                "--tls-cert, --tls-key and --tls-server-name are for TLS; pass the CA of the server with "
                "--tls-ca"
            )
        elif read_token:
            self._credentials = self._token_without_tls(read_token, is_allowed=insecure_token)

    def _token_without_tls(
        self, read_token: Callable[[], str], *, is_allowed: bool
    ) -> grpc.ChannelCredentials:
        if not is_allowed:
            raise UsageError(
                "a token is sent over TLS only; pass the CA of the server with --tls-ca, or --insecure-token "
                "if a sidecar or tunnel on this machine adds TLS"
            )
        if not is_local(self.address):
            raise UsageError(
                f"--insecure-token sends a token to this machine only, and {self.address} may be another "
                "one; use 127.0.0.1, [::1], localhost or unix:/path, or TLS with --tls-ca"
            )
        return local_credentials(self.address, read_token)

    def channel(self, consistency: Consistency | None = None) -> grpc.aio.Channel:
        """Return a channel to the server; its calls fail at once if no server answers."""
        return channel(
            self.address,
            self._credentials,
            wait_for_ready=False,
            server_name=self._server_name,
            consistency=consistency,
        )

    def explain(self, failure: RosterError) -> str:
        """Return the message to print for a failed call; it may open a connection to find the cause."""
        if isinstance(failure, ProxyRefused | ProxyUnavailable):
            return f"{self.address}: {failure.message}"
        if isinstance(failure, Unauthenticated):
            return f"{failure.message}; {self._explain_refusal()}"
        if not isinstance(failure, Disconnected):
            return failure.message
        if "HTTP/1.1" in failure.message:
            return (
                f"{self.address} answers in HTTP/1.1, which is not gRPC; is it the port of the metrics, or a "
                "proxy without HTTP/2?"
            )
        if found := diagnose(self.address, self._tls) or self._token_problem():
            return found
        return self._explain_no_server(failure)

    def _explain_no_server(self, failure: Disconnected) -> str:
        if is_local(self.address):
            return f"no server answers at {self.address}; start one with `roster serve`, or set --address"
        if failure.message.startswith(no_server(self.address)):
            return failure.message
        return f"no server answers at {self.address}: {failure.message}"

    def _explain_refusal(self) -> str:
        if problem := self._token_problem():
            return problem
        has_certificate = bool(self._tls and self._tls.has_certificate)
        token = self._read_token() if self._read_token else None
        return explain_refusal(token, self._token_source, self._token_option, has_certificate=has_certificate)

    def _token_problem(self) -> str:
        """Return why gRPC can't send the token, "" if it can; gRPC itself reports a lost connection."""
        if not self._read_token:
            return ""
        try:
            token = self._read_token()
        except OSError as error:
            return f"{self._token_source} can't be read: {error.strerror}"
        except UnicodeDecodeError:
            return f"{self._token_source} contains no token: it is not text"
        if not HEADER.fullmatch(token):
            return f"{self._token_source} contains more than a token; a token is one line of ASCII"
        return ""


def _tls_context(ca: Path, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """Return the client's TLS context, for a diagnosis; raises UsageError for files that can't be used.

    gRPC itself reports a file that it can't use only as a connection that fails.
    """
    if bool(cert) != bool(key):
        raise UsageError("--tls-cert and --tls-key belong together; pass both, or neither")
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise UsageError(f"--tls-ca {ca} contains no certificate in PEM") from None
    try:
        if cert and key:
            context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        raise UsageError(f"--tls-cert {cert} and --tls-key {key} can't be used: {_reason(error)}") from None
    return context


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "they are not a certificate and its key in PEM").replace("_", " ").lower()


def server_options(
    command: Callable[..., None],
    token_file: str = TOKEN_FILE,
) -> Callable[..., None]:
    """Add the connection options; the command receives them as `target`."""

    @wraps(command)
    def with_target(**options: Any) -> None:
        connection = {name: options.pop(name) for name in FOR_CLIENTS.values()}
        _require_one_source(connection)
        command(target=Target(**connection, token_option=token_file), **options)

    own = [*getattr(command, "__click_params__", [])]
    for add in reversed((*SERVER, _token_file(token_file), *TOKEN)):
        with_target = add(with_target)
    # Click collects options from the last to the first. In the help, those of the command come first.
    parameters: list[click.Parameter] = with_target.__click_params__  # type: ignore[attr-defined]
    parameters[:] = [*parameters[len(own) :], *own]
    return with_target


def _require_one_source(connection: Mapping[str, Any]) -> None:
    """Refuse to send the user's token, or use the user's key, for a server that only a `.env` file names."""
    source = click.get_current_context().get_parameter_source
    from_folder = {name for name in connection if source(name) is ParameterSource.DEFAULT_MAP}
    if "token_file" in from_folder and not connection["token_file"].resolve().is_relative_to(Path.cwd()):
        from_folder.remove("token_file")  # the `.env` file names it, but the secret is stored elsewhere
    token = "token_file" if connection["token_file"] else "token"
    secrets = [name for name in (token, "tls_key") if connection[name] and name not in from_folder]
    if secrets and (named := from_folder & DESTINATION):
        variables = [variable for variable, name in FOR_CLIENTS.items() if name in named]
        options = [f"--{name}".replace("_", "-") for name in sorted(named)]
        raise UsageError(
            f"{' and '.join(variables)} in the .env of this directory would receive a token or key that is "
            f"set elsewhere; pass {' and '.join(options)}, or set all of them in one place"
        )


class Integer(click.IntRange):
    """A whole number; Click's errors would call it an integer range."""

    name = "integer"


class UsageError(click.ClickException):
    """An error that stops a command, with exit status 2. Each argument is one line."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n       ".join(map(escape, lines)))
        self.lines = lines

    def show(self, file: IO[Any] | None = None) -> None:
        stream = file or sys.stderr
        first, *others = self.message.split("\n")
        lines = [f"Error: {first}", *others]
        click.echo("\n".join(wrap(lines, len("Error: "), stream)), file=stream)


def echo(*lines: str, err: bool = False) -> None:
    """Print lines, escaped: text from elsewhere can't add lines or control the terminal."""
    try:
        click.echo("\n".join(map(escape, lines)), err=err)
    except BrokenPipeError:  # the reader has closed the pipe
        raise
    except OSError as error:
        raise error if err else output_error(error) from None


def output_error(error: OSError) -> UsageError:
    """Return the error for standard output that can't be written, and drop the rest of it.

    Otherwise the end of the process would write the rest again, and replace the exit status.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UsageError(f"can't write standard output: {error.strerror}")


def confirm(question: str) -> bool:
    """Ask at the terminal; the end of the input is a no. Ctrl-C raises Abort."""
    try:
        return click.confirm(question, err=True)
    except click.Abort as abort:
        if isinstance(abort.__context__, KeyboardInterrupt):
            raise
        echo(err=True)
        return False


def echo_text(*lines: str, indent: int, err: bool = False) -> None:
    """Print lines like `echo`; on a terminal, continue those that are too long on indented lines."""
    echo(*wrap(lines, indent, sys.stderr if err else sys.stdout), err=err)


def wrap(lines: Iterable[str], indent: int, stream: IO[Any]) -> list[str]:
    """Return lines that fit the terminal, if the stream is one; words and paths are not broken."""
    if not stream.isatty():
        return [*lines]
    fill = partial(
        textwrap.wrap,
        width=shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return [part for line in lines for part in fill(escape(line)) or [""]]


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 row` or `1,000 rows`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


@contextmanager
def exit_on_signal(describe: Callable[[], str]) -> Iterator[None]:
    """Exit on SIGINT or SIGTERM, and print `interrupted` with what `describe` returns."""
    received = [int(signal.SIGINT)]

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as `&` in a script sets it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)  # asyncio cancels its main task on SIGINT only

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        echo(f"interrupted{describe()}", err=True)
        sys.exit(128 + received[-1])  # the status that shells use
