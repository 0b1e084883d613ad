"""Clients in other languages, as people use them, against the command that people start."""

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
    "roster.v1.PostService",
    "roster.v1.UserService",
]

CLIENTS = [Grpcurl, Buf, Node]


@pytest.fixture(scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Where `roster serve` listens, as the embedded default has it; one for all tests."""
    async with serving(tmp_path_factory.mktemp("server")) as server:
        yield server.address


@pytest.fixture(scope="module")
async def socket(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Where one listens on a Unix socket."""
    folder = tmp_path_factory.mktemp("socket")
    async with serving(folder, ROSTER_LISTEN=f"unix:{folder}/roster.sock") as server:
        yield server.address


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, address: str) -> Client:
    """One client after the other."""
    client: Client = request.param(address)
    return client


@pytest.fixture
def domain(request: pytest.FixtureRequest, client: Client) -> str:
    """A domain for the e-mails of one test with one client."""
    return f"{request.function.__name__}.{type(client).__name__.lower()}.example".replace("_", "-")


async def test_a_user_is_created_and_found_by_email(client: Client, domain: str) -> None:
    """What was created comes back, whatever the spelling of the e-mail."""
    email = f"zo\u00eb@{domain}"
    (created,) = await client.call(
        "CreateUser", {"user": {"email": email, "full_name": "Zo\u00eb \U0001d6bf"}}
    )

    assert (created.email, created.full_name, created.is_active) == (email, "Zo\u00eb \U0001d6bf", True)
    assert [created] == await client.call("GetUser", {"email": email.upper()})


async def test_a_filter_says_what_is_listed(client: Client, domain: str) -> None:
    """In its language, quotes and all, and a page at a time."""
    for name in ("ada", "alan", "barbara"):
        await client.call("CreateUser", {"user": {"email": f"{name}@{domain}", "is_active": name != "ada"}})

    query = {"filter": f'email : "@{domain}" AND is_active = true', "order_by": "email desc", "page_size": 1}
    (first,) = await client.call("ListUsers", query)
    (second,) = await client.call("ListUsers", {**query, "page_token": first.next_page_token})

    assert [user.email.split("@")[0] for user in [*first.users, *second.users]] == ["barbara", "alan"]
    assert second.next_page_token == ""


async def test_a_refusal_can_be_read(client: Client, domain: str) -> None:
    """The reason to switch on, the facts, and the field at fault."""
    (ada,) = await client.call("CreateUser", {"user": {"email": f"ada@{domain}"}})

    taken = await refusal(client.call("CreateUser", {"user": {"email": f"ada@{domain}"}}))
    assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    assert taken.facts == {"existing_id": str(ada.id)}

    wrong = await refusal(client.call("CreateUser", {"user": {"email": domain}}))
    assert (wrong.code, wrong.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert wrong.fields == ["user.email"]
    assert wrong.message == "user.email must be one name, one @ and one domain, without spaces"


async def test_lines_of_json_are_a_bulk_load(client: Client, domain: str) -> None:
    """A row that fails says why, and takes no other with it."""
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


async def test_an_export_streams_what_was_loaded(client: Client, domain: str) -> None:
    """Message by message, as many users in each as asked for."""
    rows = [{"email": f"{name}@{domain}"} for name in ("ada", "alan", "barbara")]
    await client.call("BulkCreateUsers", {"users": rows})

    messages = await client.call("ExportUsers", {"filter": f'email : "@{domain}"', "batch_size": 2})

    exported = [[user.email for user in message.users] for message in messages]
    assert exported == [[f"ada@{domain}", f"alan@{domain}"], [f"barbara@{domain}"]]


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_unix_socket_takes_calls_too(kind: type[Client], socket: str) -> None:
    """The address that the server prints is what clients take."""
    email = f"{kind.__name__.lower()}@example.org"
    (created,) = await kind(socket).call("CreateUser", {"user": {"email": email}})

    assert created.email == email


async def test_grpcurl_describes_all_that_it_lists(address: str) -> None:
    """All services without being told a name, a method by its own name (ghz asks so), and a message."""
    grpcurl = Grpcurl(address)
    listed = await grpcurl.ask(address, "list")
    assert listed.out.splitlines() == SERVICES

    described = await grpcurl.ask(address, "describe")
    assert described.status == 0
    assert [f"{name} is a service:" in described.out for name in SERVICES] == [True] * len(SERVICES)

    method = await grpcurl.ask(address, "describe", "roster.v1.UserService.GetUser")
    assert "rpc GetUser ( .roster.v1.GetUserRequest ) returns ( .roster.v1.User );" in method.out
    message = await grpcurl.ask(address, "describe", "roster.v1.GetUserRequest")
    assert "string email = 2;" in message.out


async def test_grpcurl_prints_error_details_for_people(address: str) -> None:
    """Not as bytes: the server teaches it the types of google.rpc as well."""
    said = (await Grpcurl(address).ask("-d", "{}", address, "roster.v1.UserService/CreateUser")).err

    assert "Code: InvalidArgument" in said
    assert '"reason": "INVALID_FIELD"' in said
    assert '"field": "user.email"' in said


async def test_buf_lists_services_and_their_methods(address: str) -> None:
    """Of every service that the server has."""
    services = await Buf(address).ask("--list-services")
    assert services.out.splitlines() == SERVICES

    methods = await Buf(address).ask("--list-methods")
    assert methods.status == 0
    assert {"roster.v1.UserService/GetUser", "grpc.health.v1.Health/Check"} <= set(methods.out.splitlines())
