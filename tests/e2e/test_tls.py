"""TLS: which connections are accepted, callers with certificates, and the rotation of certificates."""

import asyncio
import json
import ssl
import warnings
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.client import tls_credentials
from roster.client.calls import OPTIONS
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.e2e.clients import Grpcurl
from tests.e2e.secured import Secured, secured
from tests.support.authority import DAY, Authority
from tests.support.errors import Refusal, refusal

LOADER, READER = "spiffe://example.org/prod/loads", "spiffe://example.org/prod/billing"
UNKNOWN = "a valid token or client certificate is required"
DENIED = "the caller has no role that allows this"
CALLS = 20
EXPIRED = timedelta(days=-1)
METHOD = "roster.v1.UserService/CreateUser"
CREATE = {"user": {"email": "ada@example.org"}}


@pytest.fixture
async def roster(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Secured]:
    """A server that authenticates callers by certificates, or by tokens on top of them."""
    async with secured(sqlite_url, tmp_path, client_ca=True, tokens=True) as server:
        yield server


async def create(connection: grpc.aio.Channel) -> Refusal:
    async with connection:
        request = CreateUserRequest(user=User(email="ada@example.org"))
        return await refusal(UserServiceStub(connection).CreateUser(request, timeout=20))


@pytest.mark.parametrize("pair", [None, "stranger's", "expired"])
async def test_client_without_valid_certificate_is_refused(pair: str | None, roster: Secured) -> None:
    """Without one, with one of another authority, or an expired one: no call is read."""
    pairs = {
        "stranger's": Authority().issue(LOADER),
        "expired": roster.authority.issue(LOADER, valid_for=EXPIRED),
        None: None,
    }
    refused = await create(roster.channel(roster.issuer.token("admin"), pairs[pair]))
    grpcurl = roster.grpcurl(roster.issuer.token("admin"), pairs[pair])
    ended = await grpcurl.run(METHOD, json.dumps(CREATE))

    assert refused.code == grpc.StatusCode.UNAVAILABLE
    assert ended.status
    assert await roster.stored() == 0


async def test_plain_text_connection_is_refused(roster: Secured) -> None:
    """From our client and from grpcurl."""
    refused = await create(grpc.aio.insecure_channel(roster.address))
    ended = await Grpcurl(roster.address, "-plaintext", "-connect-timeout=1").ask(roster.address, "list")

    assert refused.code == grpc.StatusCode.UNAVAILABLE
    assert ended.status
    assert await roster.stored() == 0


@pytest.mark.parametrize(
    ("name", "valid_for", "is_trusted"),
    [("127.0.0.1", DAY, False), ("127.0.0.1", EXPIRED, True), ("roster.example.org", DAY, True)],
    ids=["another authority", "expired", "another name"],
)
async def test_client_refuses_an_untrusted_server(
    name: str, valid_for: timedelta, is_trusted: bool, sqlite_url: str, tmp_path: Path
) -> None:
    """Before it sends its token."""
    async with secured(sqlite_url, tmp_path, tokens=True, name=name, valid_for=valid_for) as server:
        trusted = server.authority if is_trusted else Authority()
        trusted.write(server.folder)
        token = server.issuer.token("writer")
        refused = await create(
            grpc.aio.secure_channel(server.address, tls_credentials(trusted.cert, token=lambda: token))
        )
        ended = await server.grpcurl(token).run(METHOD, json.dumps(CREATE))

        assert refused.code == grpc.StatusCode.UNAVAILABLE
        assert "x509: " in ended.err
        assert await server.stored() == 0


@pytest.mark.parametrize(
    ("names", "code", "message"),
    [
        ([READER], grpc.StatusCode.PERMISSION_DENIED, DENIED),
        ([LOADER], grpc.StatusCode.PERMISSION_DENIED, DENIED),
        (["spiffe://example.org/test/billing"], grpc.StatusCode.PERMISSION_DENIED, DENIED),
        (["loads.example.org"], grpc.StatusCode.PERMISSION_DENIED, DENIED),
        (["ada@example.org"], grpc.StatusCode.UNAUTHENTICATED, UNKNOWN),
        ([LOADER, READER], grpc.StatusCode.UNAUTHENTICATED, UNKNOWN),
        (["loads.example.org", LOADER, READER], grpc.StatusCode.UNAUTHENTICATED, UNKNOWN),
    ],
)
async def test_certificate_grants_only_the_rights_of_its_name(
    names: list[str], code: grpc.StatusCode, message: str, roster: Secured
) -> None:
    """From both clients; a SPIFFE ID must be the only URI."""
    pair = roster.authority.issue(*names)

    for refused in (
        await create(roster.channel(pair=pair)),
        await refusal(roster.grpcurl(pair=pair).call("CreateUser", CREATE)),
    ):
        assert (refused.code, refused.message) == (code, message)
    assert await roster.stored() == 0


@pytest.mark.parametrize(
    ("name", "rpc"),
    [(READER, "ListUsers"), (LOADER, "ListBulkLoads"), ("Loads.Example.org", "ListBulkLoads")],
)
async def test_certificate_identifies_its_caller(name: str, rpc: str, roster: Secured) -> None:
    """By its SPIFFE ID, with the most specific line of the policy, or by its DNS name."""
    assert len(await roster.grpcurl(pair=roster.authority.issue(name)).call(rpc, {})) == 1


async def test_token_takes_precedence_over_certificate(roster: Secured) -> None:
    """An invalid token is refused despite a valid certificate."""
    pair = roster.authority.issue(READER)
    good = roster.grpcurl(roster.issuer.token("writer"), pair)
    assert len(await good.call("CreateUser", CREATE)) == 1

    refused = await refusal(roster.grpcurl(roster.issuer.unsigned(), pair).call("ListUsers", {}))
    assert (refused.code, refused.message) == (grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)


async def handshake(server: Secured, version: ssl.TLSVersion | None = None) -> ssl.SSLObject:
    """Perform a TLS handshake as a client, and return the result."""
    context = ssl.create_default_context(cadata=server.authority.cert.decode())
    context.load_cert_chain(*server.authority.issue(READER).write(server.folder / "client"))
    context.set_alpn_protocols(["h2"])
    if version:
        context.set_ciphers("ALL:@SECLEVEL=0")  # otherwise the client itself would not offer an old one
        with warnings.catch_warnings(action="ignore"):
            context.minimum_version = context.maximum_version = version
    host, _, port = server.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    shaken: ssl.SSLObject = writer.get_extra_info("ssl_object")
    writer.transport.abort()
    return shaken


async def test_tls_before_1_2_is_refused(roster: Secured) -> None:
    """The library's default may be lower."""
    (roster.folder / "client").mkdir()

    assert (await handshake(roster, ssl.TLSVersion.TLSv1_2)).version() == "TLSv1.2"
    with pytest.raises(ConnectionResetError):  # by the server: none of the errors of the client itself
        await handshake(roster, ssl.TLSVersion.TLSv1_1)


async def test_certificate_rotation_drops_no_call(roster: Secured) -> None:
    """Also while only one file of the pair is new; open streams continue."""
    (roster.folder / "client").mkdir()
    old = (roster.folder / "cert.pem").read_bytes()
    new = roster.authority.issue("127.0.0.1")
    answered, stop = asyncio.Semaphore(0), asyncio.Event()
    callers = [
        asyncio.create_task(calling(roster, answered, stop, is_new=is_new)) for is_new in (True, False)
    ]
    async with roster.channel(pair=roster.authority.issue(LOADER)) as loader:
        stream = UserServiceStub(loader).BulkCreateUsers()
        await stream.write(BulkCreateUsersRequest(users=[User(email="ada@example.org")]))
        assert [await kind_of(stream), await kind_of(stream)] == ["opened", "ack"]

        served = [await served_meanwhile(roster, answered)]
        (roster.folder / "cert.pem").write_bytes(new.cert)
        served.append(await served_meanwhile(roster, answered))
        (roster.folder / "key.pem").write_bytes(new.key)
        served.append(await served_meanwhile(roster, answered))

        await stream.write(BulkCreateUsersRequest(users=[User(email="alan@example.org")], finish=True))
        assert [await kind_of(stream), await kind_of(stream)] == ["ack", "summary"]
    stop.set()
    await asyncio.gather(*callers)  # raises where a call failed

    assert served == [old, old, new.cert]
    assert await roster.stored() == 2


async def calling(server: Secured, answered: asyncio.Semaphore, stop: asyncio.Event, *, is_new: bool) -> None:
    """Make calls all the time, on one connection or on a new one each time."""
    pair = server.authority.issue(READER)
    credentials = tls_credentials(server.authority.cert, pair.key, pair.cert)
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    while not stop.is_set():
        async with grpc.aio.secure_channel(server.address, credentials, options) as connection:
            users = UserServiceStub(connection)
            while not stop.is_set():
                await users.ListUsers(ListUsersRequest())
                answered.release()
                if is_new:
                    break


async def served_meanwhile(server: Secured, answered: asyncio.Semaphore) -> bytes:
    """Return the certificate that a new connection gets while other calls run."""
    for _ in range(CALLS):
        await answered.acquire()
    certificate = (await handshake(server)).getpeercert(binary_form=True)
    for _ in range(CALLS):
        await answered.acquire()
    return ssl.DER_cert_to_PEM_cert(certificate or b"").encode()


async def kind_of(stream: Any) -> str:
    return str((await stream.read()).WhichOneof("event"))
