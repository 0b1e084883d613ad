"""What an internal service gets from `service.client`, against a real server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from roster.v1.bulk_pb2 import BulkOpened, BulkSummary
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.client import BulkLoader, DeadlineExceeded, Disconnected, channel, pages
from service.errors import (
    EmailTaken,
    InvalidField,
    InvalidFilter,
    OutcomeUnknown,
    UserNotFound,
    VersionMismatch,
)
from service.server import Server
from service.status import status_from_error

ADA = User(email="ada@example.org")


@pytest.fixture
async def users(server: Server) -> AsyncIterator[UserServiceStub]:
    """The typed stub on the client's own channel."""
    async with channel(server.address) as connection:
        yield UserServiceStub(connection)


async def test_errors_are_those_of_the_domain(users: UserServiceStub) -> None:
    """Each reason is a class, with the facts; no status codes."""
    ada = await users.CreateUser(CreateUserRequest(user=ADA))

    with pytest.raises(EmailTaken) as taken:
        await users.CreateUser(CreateUserRequest(user=ADA))
    assert taken.value.facts == {"existing_id": ada.id}
    with pytest.raises(InvalidField) as invalid:
        await users.CreateUser(CreateUserRequest(user=User(email="nobody")))
    assert invalid.value.field == "user.email"
    with pytest.raises(UserNotFound):
        await users.GetUser(GetUserRequest(id=ada.id + 1))
    with pytest.raises(VersionMismatch):
        await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, full_name="Ada", version=7)))


async def test_a_stream_of_answers_raises_them_too(users: UserServiceStub) -> None:
    """Where it is read."""
    with pytest.raises(InvalidFilter):
        [answer async for answer in users.ExportUsers(ExportUsersRequest(filter="("))]


class Forgetful:
    """Hands a call on to a server, and loses the first answer."""

    def __init__(self, users: UserServiceStub, code: grpc.StatusCode, details: Any = ()) -> None:
        self.users = users
        self.code = code
        self.details = details
        self.request_ids: list[str] = []

    async def create(self, request: CreateUserRequest, context: Any) -> User:
        """Answer a CreateUser."""
        self.request_ids.append(request.request_id)
        created = await self.users.CreateUser(request)
        if len(self.request_ids) == 1:
            await context.abort(self.code, "the answer was lost", trailing_metadata=self.details)
        return created


@asynccontextmanager
async def behind(forgetful: Forgetful) -> AsyncIterator[UserServiceStub]:
    """The client of a proxy."""
    proxy = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        forgetful.create, CreateUserRequest.FromString, User.SerializeToString
    )
    proxy.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("roster.v1.UserService", {"CreateUser": handler})]
    )
    port = proxy.add_insecure_port("127.0.0.1:0")
    await proxy.start()
    async with channel(f"127.0.0.1:{port}") as connection:
        yield UserServiceStub(connection)
    await proxy.stop(None)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_write_that_is_sent_again_happens_once(users: UserServiceStub, code: grpc.StatusCode) -> None:
    """The answer was lost on its way, or with its server; the second try gets it: both have the same id."""
    forgetful = Forgetful(users, code)
    async with behind(forgetful) as forgotten:
        created = await forgotten.CreateUser(CreateUserRequest(user=ADA))

    first, second = forgetful.request_ids
    assert first == second != ""
    assert await users.GetUser(GetUserRequest(email=ADA.email)) == created


async def test_a_write_whose_outcome_is_unknown_is_sent_once_more(users: UserServiceStub) -> None:
    """The same one: the server answers as it did when it happened."""
    status = status_from_error(OutcomeUnknown("the connection broke during the commit"))
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    forgetful = Forgetful(users, grpc.StatusCode.INTERNAL, details)
    async with behind(forgetful) as forgotten:
        created = await forgotten.CreateUser(CreateUserRequest(user=ADA))

    first, second = forgetful.request_ids
    assert first == second != ""
    assert await users.GetUser(GetUserRequest(email=ADA.email)) == created


async def test_a_write_without_an_answer_can_be_sent_again() -> None:
    """The error has its id, which the caller did not give."""
    async with channel("unix:/nowhere/roster.sock", timeout=0.1) as connection:
        with pytest.raises(DeadlineExceeded) as late:
            await UserServiceStub(connection).CreateUser(CreateUserRequest(user=ADA))
    assert UUID(str(late.value.facts["request_id"]))


async def test_a_request_id_of_the_caller_is_kept(users: UserServiceStub) -> None:
    """What the caller sends is what is sent, and is left as it was."""
    named = CreateUserRequest(user=ADA, request_id=str(uuid4()))
    assert await users.CreateUser(named) == await users.CreateUser(named)

    unnamed = CreateUserRequest(user=User(email="alan@example.org"))
    await users.CreateUser(unnamed)
    assert unnamed.request_id == ""


async def test_pages_are_walked(users: UserServiceStub) -> None:
    """Row by row, whatever the size of a page."""
    emails = [f"{number}@example.org" for number in range(5)]
    for email in emails:
        await users.CreateUser(CreateUserRequest(user=User(email=email)))

    walked = [user.email async for user in pages(users.ListUsers, ListUsersRequest(page_size=2))]
    assert walked == emails


async def test_a_load_without_options_has_a_name(users: UserServiceStub) -> None:
    """So that it survives a restart of the server."""

    async def rows() -> AsyncIterator[User]:
        yield ADA

    opened, _, summary = [
        event async for event in BulkLoader(users.BulkCreateUsers, BulkCreateUsersRequest).run(rows())
    ]
    assert isinstance(opened, BulkOpened)
    assert opened.load_id
    assert isinstance(summary, BulkSummary)
    assert summary.created == 1


async def test_an_impatient_channel_says_at_once_that_nobody_is_there() -> None:
    """A patient one waits for a server, as long as the call has time."""
    async with channel("unix:/nowhere/roster.sock", is_patient=False) as connection:
        with pytest.raises(Disconnected):
            await UserServiceStub(connection).GetUser(GetUserRequest(id=1))
    async with channel("unix:/nowhere/roster.sock", timeout=0.1) as connection:
        with pytest.raises(DeadlineExceeded, match="sock did not answer in 0"):
            await UserServiceStub(connection).GetUser(GetUserRequest(id=1))
