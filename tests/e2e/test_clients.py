"""Clients in other languages against the command `roster serve`."""

from collections.abc import AsyncIterator

import grpc
import pytest

from roster.v1.bulk_pb2 import BulkLoad, BulkOpened, BulkSummary
from tests.e2e.clients import Buf, Client, Grpcurl, Node
from tests.support.command import serving
from tests.support.errors import refusal

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "roster.v1.BulkService",
    "roster.v1.ChangeService",
    "roster.v1.PostService",
    "roster.v1.UserService",
]

CLIENTS = [Grpcurl, Buf, Node]


@pytest.fixture(scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The address of a `roster serve` on SQLite that all tests share."""
    async with serving(tmp_path_factory.mktemp("server")) as server:
        yield server.address


@pytest.fixture(scope="module")
async def socket(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The address of a `roster serve` on a Unix socket."""
    folder = tmp_path_factory.mktemp("socket")
    async with serving(folder, ROSTER_LISTEN=f"unix:{folder}/roster.sock") as server:
        yield server.address


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, address: str) -> Client:
    """Each client in turn."""
    client: Client = request.param(address)
    return client


@pytest.fixture
def domain(request: pytest.FixtureRequest, client: Client) -> str:
    """A domain for the e-mails of one test and client."""
    return f"{request.function.__name__}.{type(client).__name__.lower()}.example".replace("_", "-")


async def test_creates_and_finds_user_by_email(client: Client, domain: str) -> None:
    """The lookup ignores the case of the e-mail."""
    email = f"zo\u00eb@{domain}"
    (created,) = await client.call(
        "CreateUser", {"user": {"email": email, "full_name": "Zo\u00eb \U0001d6bf"}}
    )

    assert (created.email, created.full_name, created.is_active) == (email, "Zo\u00eb \U0001d6bf", True)
    assert [created] == await client.call("GetUser", {"email": email.upper()})


async def test_lists_users_by_filter(client: Client, domain: str) -> None:
    """With quotes in the filter, page by page."""
    for name in ("ada", "alan", "barbara"):
        await client.call("CreateUser", {"user": {"email": f"{name}@{domain}", "is_active": name != "ada"}})

    query = {"filter": f'email : "@{domain}" AND is_active = true', "order_by": "email desc", "page_size": 1}
    (first,) = await client.call("ListUsers", query)
    (second,) = await client.call("ListUsers", {**query, "page_token": first.next_page_token})

    assert [user.email.split("@")[0] for user in [*first.users, *second.users]] == ["barbara", "alan"]
    assert second.next_page_token == ""


async def test_reads_error_details(client: Client, domain: str) -> None:
    """Reason, facts and violated field."""
    (ada,) = await client.call("CreateUser", {"user": {"email": f"ada@{domain}"}})

    taken = await refusal(client.call("CreateUser", {"user": {"email": f"ada@{domain}"}}))
    assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    assert taken.facts == {"existing_id": str(ada.id)}

    wrong = await refusal(client.call("CreateUser", {"user": {"email": domain}}))
    assert (wrong.code, wrong.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert wrong.fields == ["user.email"]
    assert wrong.message == "user.email must be one name, one @ and one domain, without spaces"


async def test_loads_users_in_bulk(client: Client, domain: str) -> None:
    """A bad row has a reason, and does not affect the others."""
    opened, first, second, third, summary = await client.call(
        "BulkCreateUsers",
        {"options": {"return_ids": True}, "users": [{"email": f"ada@{domain}"}]},
        {"users": [{"email": "nobody"}]},
        {"users": [{"email": f"alan@{domain}", "full_name": "Alan"}], "finish": True},
    )

    assert opened.opened == BulkOpened(max_rows=5000, max_bytes=4 << 20)
    acks = [first.ack, second.ack, third.ack]
    assert [(ack.created, ack.failed) for ack in acks] == [(1, 0), (0, 1), (1, 0)]
    (failure,) = second.ack.failures
    assert (failure.offset, failure.reason, failure.field) == (1, "INVALID_FIELD", "email")
    assert summary.summary == BulkSummary(next_offset=3, created=2, failed=1, state=BulkLoad.FINISHED)

    (ada,) = await client.call("GetUser", {"email": f"ada@{domain}"})
    assert list(first.ack.ids) == [ada.id]


async def test_exports_loaded_users(client: Client, domain: str) -> None:
    """Each message has the requested number of users."""
    rows = [{"email": f"{name}@{domain}"} for name in ("ada", "alan", "barbara")]
    await client.call("BulkCreateUsers", {"users": rows})

    messages = await client.call("ExportUsers", {"filter": f'email : "@{domain}"', "batch_size": 2})

    exported = [[user.email for user in message.users] for message in messages]
    assert exported == [[f"ada@{domain}", f"alan@{domain}"], [f"barbara@{domain}"]]


@pytest.mark.parametrize("kind", CLIENTS)
async def test_calls_over_unix_socket(kind: type[Client], socket: str) -> None:
    """Clients use the address that the server prints."""
    email = f"{kind.__name__.lower()}@example.org"
    (created,) = await kind(socket).call("CreateUser", {"user": {"email": email}})

    assert created.email == email


async def test_grpcurl_lists_and_describes_services(address: str) -> None:
    """Without files of the contract; ghz asks for a method by its own name."""
    grpcurl = Grpcurl(address)
    listed = await grpcurl.ask(address, "list")
    assert listed.out.splitlines() == SERVICES

    described = await grpcurl.ask(address, "describe")
    assert described.status == 0
    assert [f"{name} is a service:" in described.out for name in SERVICES] == [True] * len(SERVICES)

    method = await grpcurl.ask(address, "describe", "roster.v1.UserService.GetUser")
    assert "rpc GetUser ( .roster.v1.GetUserRequest ) returns ( .roster.v1.User )" in method.out
    message = await grpcurl.ask(address, "describe", "roster.v1.GetUserRequest")
    assert "string email = 2 [" in message.out


async def test_grpcurl_prints_error_details(address: str) -> None:
    """Decoded: reflection also serves the types of google.rpc."""
    said = (await Grpcurl(address).ask("-d", "{}", address, "roster.v1.UserService/CreateUser")).err

    assert "Code: InvalidArgument" in said
    assert '"reason": "INVALID_FIELD"' in said
    assert '"field": "user.email"' in said


async def test_buf_lists_services_and_their_methods(address: str) -> None:
    """All services of the server."""
    services = await Buf(address).ask("--list-services")
    assert services.out.splitlines() == SERVICES

    methods = await Buf(address).ask("--list-methods")
    assert methods.status == 0
    assert {"roster.v1.UserService/GetUser", "grpc.health.v1.Health/Check"} <= set(methods.out.splitlines())
