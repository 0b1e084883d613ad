"""Clients of a server that is reached through something else: tunnels, sidecars, the wrong port."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.client import Disconnected, channel, local_credentials, tls_credentials
from roster.errors import PermissionDenied, UserNotFound
from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from tests.e2e.secured import POLICY, Secured, secured
from tests.support.authority import Authority
from tests.support.command import ROSTER, Ended, ended, start
from tests.support.issuer import AUDIENCE, ISSUER, Issuer
from tests.support.server import serve

NAME = "roster.example.org"


async def roster(address: str, *words: str, **variables: Any) -> Ended:
    """Run the command as a client of an address."""
    variables["ROSTER_ADDRESS"] = address
    return await ended(await start(ROSTER, *words, **variables))


def sentence(done: Ended) -> str:
    """Return the error of a command that has failed."""
    assert (done.status, done.out) == (2, "")
    return " ".join(done.err.removeprefix("Error: ").split())


@pytest.fixture
async def named(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Secured]:
    """A server whose certificate is for a name, reached by its address as through a tunnel."""
    async with secured(sqlite_url, tmp_path, tokens=True, name=NAME) as server:
        yield server


async def get(server: Secured, server_name: str | None) -> None:
    """Call the server with a token."""
    token = server.issuer.token("reader")
    credentials = tls_credentials(server.authority.cert, token=lambda: token)
    async with channel(
        server.address, credentials, wait_for_ready=False, server_name=server_name
    ) as connection:
        await UserServiceStub(connection).GetUser(GetUserRequest(id=1))


@pytest.mark.parametrize("server_name", [None, "other.example.org", "example.org", "127.0.0.1"])
async def test_certificate_is_checked_against_the_name(named: Secured, server_name: str | None) -> None:
    """Only the name in the certificate is accepted: the option does not turn the check off."""
    with pytest.raises(UserNotFound):
        await get(named, NAME)
    with pytest.raises(Disconnected):
        await get(named, server_name)


async def test_command_takes_the_name_from_option_or_environment(named: Secured, tmp_path: Path) -> None:
    """Without it, the error has the name of the certificate and the option."""
    variables = {"ROSTER_TLS_CA_FILE": f"{tmp_path}/ca.pem", "ROSTER_TOKEN": named.issuer.token("admin")}
    for command in (["loads"], ["export", "users"]):
        by_option = await roster(named.address, *command, "--tls-server-name", NAME, **variables)
        by_variable = await roster(named.address, *command, ROSTER_TLS_SERVER_NAME=NAME, **variables)
        without = await roster(named.address, *command, **variables)

        assert (by_option.status, by_variable.status) == (0, 0)
        assert sentence(without) == (
            f"the certificate of {named.address} is not for 127.0.0.1, but for {NAME}; pass a name in it "
            "with --tls-server-name"
        )


async def test_command_says_that_the_server_uses_tls(named: Secured, server: Server) -> None:
    """And the other way round."""
    plain = await roster(named.address, "loads")
    tls = await roster(server.address, "loads", "--tls-ca", f"{named.folder}/ca.pem")

    assert sentence(plain) == f"the server at {named.address} uses TLS; pass its CA with --tls-ca"
    assert sentence(tls) == f"the server at {server.address} does not use TLS; leave out --tls-ca"


async def refusal(server: Secured, folder: Path, token: str | bytes | None = None, **claims: Any) -> str:
    """Return what the command says of a token, or without one."""
    options = ["--tls-ca", f"{server.folder}/ca.pem", "--tls-server-name", NAME]
    if token is not None or claims:
        text = server.issuer.token("admin", **claims) if token is None else token
        (folder / "tok1").write_bytes(text if isinstance(text, bytes) else text.encode())
        options += ["--token-file", "tok1"]
    process = await start(ROSTER, "loads", *options, folder=folder, ROSTER_ADDRESS=server.address)
    start_of_all = "a valid token or client certificate is required; "
    said = sentence(await ended(process))
    assert said.startswith(start_of_all)
    return said.removeprefix(start_of_all)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, "pass --token-file, or --tls-cert and --tls-key"),
        ("garbage", "tok1 contains no JWT"),
        ("eyJhbGciOiJub25lIn0.W10.", "tok1 contains no JWT"),
        ("", "tok1 is empty"),
        ("bearer x.y.z", "tok1 begins with Bearer; leave out that word"),
    ],
)
async def test_command_says_what_is_not_a_token(
    named: Secured, tmp_path: Path, token: str | None, expected: str
) -> None:
    """The server reports the same for all of them."""
    assert await refusal(named, tmp_path, token) == expected


async def test_changes_names_its_own_option(named: Secured, tmp_path: Path) -> None:
    """Its --token-file is another file. A caller that may see some entities can name them."""
    tls = ["--tls-ca", f"{named.folder}/ca.pem", "--tls-server-name", NAME]
    (tmp_path / "tok1").write_text(named.issuer.token("loader"))
    without = sentence(await roster(named.address, "changes", *tls))
    denied = sentence(await roster(named.address, "changes", *tls, "--bearer-token-file", f"{tmp_path}/tok1"))

    assert without.endswith("; pass --bearer-token-file, or --tls-cert and --tls-key")
    assert denied.endswith("needs the right to get each of users, posts; --entity names some")


async def test_command_says_when_a_token_is_valid(named: Secured, tmp_path: Path) -> None:
    """By its claims, which are no secret to the client; what it can't see is in the log of the server."""
    expired = await refusal(named, tmp_path, exp=datetime(2024, 1, 31, 8, 16, tzinfo=UTC))
    early = await refusal(named, tmp_path, nbf=datetime(2199, 1, 31, 8, 16, tzinfo=UTC))
    other = await refusal(named, tmp_path, aud="another service")
    stranger = await refusal(named, tmp_path, Issuer().token("admin"))
    far = await refusal(named, tmp_path, nbf=10**30)

    assert expired == "the token in tok1 expired at 2024-01-31 08:16 UTC"
    assert early == "the token in tok1 is not valid before 2199-01-31 08:16 UTC"
    assert {other, stranger, far} == {"the server's log has the cause"}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b"\xff\xfe", "tok1 contains no token: it is not text"),
        (b"one.two.three\nfour.five.six\n", "tok1 contains more than a token; a token is one line of ASCII"),
        ("tok\u00e9n".encode(), "tok1 contains more than a token; a token is one line of ASCII"),
    ],
)
async def test_command_says_what_can_not_be_sent_as_a_token(
    named: Secured, tmp_path: Path, token: bytes, expected: str
) -> None:
    """The call fails within gRPC, which reports a lost connection."""
    (tmp_path / "tok1").write_bytes(token)
    options = ["--tls-ca", f"{named.folder}/ca.pem", "--tls-server-name", NAME, "--token-file", "tok1"]
    process = await start(ROSTER, "loads", *options, folder=tmp_path, ROSTER_ADDRESS=named.address)

    assert sentence(await ended(process)) == expected


@pytest.mark.parametrize(
    "words", [["loads"], ["export", "users"], ["load", "users", "keys.pem", "--format", "csv"]]
)
async def test_every_command_explains_a_token_of_the_environment(
    words: list[str], named: Secured, tmp_path: Path
) -> None:
    """The date is left out if it is today's."""
    (tmp_path / "keys.pem").write_text("email\na@example.org\n")
    now = datetime.now(UTC)
    token = named.issuer.token("admin", exp=now - timedelta(minutes=2))
    options = ["--tls-ca", f"{named.folder}/ca.pem", "--tls-server-name", NAME]
    variables = {"ROSTER_ADDRESS": named.address, "ROSTER_TOKEN": token}
    process = await start(ROSTER, *words, *options, folder=tmp_path, **variables)
    said = sentence(await ended(process))

    assert re.search(r"; the token in ROSTER_TOKEN expired at (\S+ )?\d\d:\d\d UTC$", said)


@pytest.mark.parametrize("host", ["nosuch.invalid", "a..b", f"{'x' * 70}.example.org"])
@pytest.mark.parametrize("prefix", ["", "dns:///"])
async def test_command_says_that_a_name_is_not_known(
    host: str, prefix: str, named: Secured, tmp_path: Path
) -> None:
    """With TLS or without: nothing can be started there."""
    address = f"{prefix}{host}:50611"
    plain = await roster(address, "loads", "--address", address)
    tls = await roster(address, "loads", "--tls-ca", f"{named.folder}/ca.pem")

    pattern = rf"the name {re.escape(host)} (is not known; check --address|can't be looked up: .*)"
    assert re.fullmatch(pattern, sentence(plain))
    assert sentence(tls) == sentence(plain)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/nowhere/roster.sock"])
async def test_error_over_tls_has_no_text_of_grpc(address: str, named: Secured) -> None:
    """It says what a connection without TLS says."""
    done = await roster(address, "loads", "--tls-ca", f"{named.folder}/ca.pem")

    assert sentence(done) == (
        f"no server answers at {address}; start one with `roster serve`, or set --address"
    )


async def test_error_about_a_remote_address_has_the_cause() -> None:
    """Nothing can be started there. An address with a scheme counts as remote."""
    done = await roster("", "loads", "--address", "ipv4:127.0.0.1:1")

    cause = "nothing listens there (connection refused)"
    assert sentence(done) == f"no server answers at ipv4:127.0.0.1:1: {cause}"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: connections are independent of it."""
    return sqlite_url


async def test_command_says_why_a_certificate_is_not_trusted(sqlite_url: str, tmp_path: Path) -> None:
    """Another CA has signed it, or it has expired."""
    (tmp_path / "other").mkdir()
    other = Authority().write(tmp_path / "other")
    async with secured(sqlite_url, tmp_path, tokens=True) as server:
        stranger = await roster(server.address, "loads", "--tls-ca", f"{other}")
    async with secured(sqlite_url, tmp_path, tokens=True, valid_for=timedelta(days=-1)) as server:
        expired = await roster(server.address, "loads", "--tls-ca", f"{tmp_path}/ca.pem")

    assert "is not trusted: certificate signature failure; --tls-ca must be the CA" in sentence(stranger)
    assert "is not trusted: certificate has expired" in sentence(expired)


async def test_command_says_that_a_client_certificate_is_required(sqlite_url: str, tmp_path: Path) -> None:
    """TLS 1.3 reports it after the handshake; a certificate of another CA is reported as unknown."""
    (tmp_path / "client").mkdir()
    cert, key = Authority().issue("spiffe://example.org/prod/loads").write(tmp_path / "client")
    async with secured(sqlite_url, tmp_path, client_ca=True) as server:
        own = ["--tls-ca", f"{tmp_path}/ca.pem"]
        missing = await roster(server.address, "loads", *own)
        unknown = await roster(server.address, "loads", *own, "--tls-cert", f"{cert}", "--tls-key", f"{key}")
        half = await roster(server.address, "loads", *own, "--tls-cert", f"{cert}")

    expected = f"the server at {server.address} requires a client certificate; pass --tls-cert and --tls-key"
    assert sentence(missing) == expected
    assert "does not accept the client certificate; check --tls-cert" in sentence(unknown)
    assert sentence(half) == "--tls-cert and --tls-key belong together; pass both, or neither"


@pytest.mark.parametrize(
    "content", ["", "nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
async def test_command_refuses_a_file_without_certificate(content: str, tmp_path: Path) -> None:
    """GRPC would report it as a server that does not answer."""
    (tmp_path / "ca.pem").write_text(content)

    refused = await roster("127.0.0.1:1", "loads", "--tls-ca", f"{tmp_path}/ca.pem")

    assert sentence(refused) == f"--tls-ca {tmp_path}/ca.pem contains no certificate in PEM"


@pytest.mark.parametrize(
    "command", [["loads"], ["export", "posts"], ["load", "users", "-", "--format", "csv"]]
)
async def test_commands_refuse_a_url(command: list[str]) -> None:
    """The error has the address to write."""
    refused = await roster("http://127.0.0.1:50051", *command)

    assert sentence(refused) == (
        "--address http://127.0.0.1:50051 has the scheme http, which gRPC does not use; write 127.0.0.1:50051"
    )


async def test_command_says_that_a_port_is_not_grpc(sqlite_url: str) -> None:
    """The port of the metrics is next to it in every configuration."""
    async with serve(sqlite_url, metrics_listen="127.0.0.1:0") as server:
        wrong = await roster(server.metrics_address, "loads")

    assert "answers in HTTP/1.1, which is not gRPC; is it the port of the metrics" in sentence(wrong)


@asynccontextmanager
async def behind_sidecar(sqlite_url: str, folder: Path, listen: str) -> AsyncIterator[tuple[Server, Issuer]]:
    """Serve without TLS, with tokens and a policy, as next to a sidecar that ends TLS."""
    issuer, policy = Issuer(), folder / "policy.toml"
    policy.write_text(POLICY)
    settings: dict[str, Any] = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "policy_file": policy}
    async with serve(sqlite_url, listen=listen, jwt_keys_file=issuer.write(folder), **settings) as server:
        yield server, issuer


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "unix:{}/roster.sock"])
async def test_token_is_sent_in_plain_text_only_if_asked(
    listen: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The server takes it as one that came over TLS."""
    async with behind_sidecar(sqlite_url, tmp_path, listen.format(tmp_path)) as (server, issuer):
        token = {"ROSTER_TOKEN": issuer.token("admin")}
        by_option = await roster(server.address, "loads", "--insecure-token", **token)
        by_variable = await roster(server.address, "loads", ROSTER_INSECURE_TOKEN="true", **token)
        refused = await roster(server.address, "loads", **token)
        credentials = local_credentials(server.address, lambda: issuer.token("loader"))
        async with channel(server.address, credentials) as connection:
            with pytest.raises(PermissionDenied):
                await UserServiceStub(connection).GetUser(GetUserRequest(id=1))

    assert (by_option.status, by_variable.status) == (0, 0)
    assert "or --insecure-token if a sidecar or tunnel on this machine adds TLS" in sentence(refused)


@pytest.mark.parametrize(
    "address", ["roster.example.org:50051", "10.0.0.7:50051", "0.0.0.0:50051", "dns:///localhost:50051"]
)
async def test_token_in_plain_text_stays_on_this_machine(address: str) -> None:
    """The command refuses every other address before it connects."""
    refused = await roster(address, "loads", "--insecure-token", ROSTER_TOKEN="secret")

    assert f"sends a token to this machine only, and {address} may be another one" in sentence(refused)


async def test_local_credentials_refuse_another_machine() -> None:
    """GRPC itself looks at the address that it is connected to: a name may resolve to anything."""
    address = _own_address()
    connected = asyncio.Event()
    received: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())
        writer.close()
        connected.set()

    async with await asyncio.start_server(listen, address, 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        target = f"{address}:{port}"
        async with grpc.aio.secure_channel(target, local_credentials(target, lambda: "secret")) as connection:
            with pytest.raises(grpc.aio.AioRpcError, match="neither UDS or TCP loopback"):
                await UserServiceStub(connection).GetUser(GetUserRequest(id=1))
        await connected.wait()

    assert b"secret" not in b"".join(received)


def _own_address() -> str:
    """Return an address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737; nothing is sent
        except OSError:
            pytest.skip("this machine has only loopback")
        return str(probe.getsockname()[0])
