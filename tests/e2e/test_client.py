"""The client library against a real server, with asyncio and blocking."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from roster import client, errors
from roster.client import (
    BulkLoader,
    DeadlineExceeded,
    Disconnected,
    blocking,
    channel,
    errors as client_errors,
    pages,
)
from roster.errors import (
    EmailTaken,
    InvalidField,
    InvalidFilter,
    OutcomeUnknown,
    UserNotFound,
    VersionMismatch,
)
from roster.v1.bulk_pb2 import BulkOpened, BulkSummary
from roster.v1.posts_pb2 import ExportPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.server import Server
from service.status import status_from_error
from tests.support.blocking import Kind, users_of
from tests.support.rows import add_posts, add_users

ADA = User(email="ada@example.org")
NO_SOCKET = "no server answers at unix:/nowhere/roster.sock: there is no such socket"


@pytest.fixture
async def users(server: Server, kind: Kind) -> AsyncIterator[UserServiceAsyncStub]:
    """The typed stub on a channel of the client library."""
    async with users_of(kind, server.address) as stub:
        yield stub


async def test_calls_raise_domain_errors(users: UserServiceAsyncStub) -> None:
    """Each reason is a class, with its facts."""
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


async def test_response_streams_raise_domain_errors(users: UserServiceAsyncStub) -> None:
    """The error is raised by the iteration."""
    with pytest.raises(InvalidFilter):
        [answer async for answer in users.ExportUsers(ExportUsersRequest(filter="("))]


class LossyProxy:
    """A proxy that loses the first response."""

    def __init__(self, users: UserServiceAsyncStub, code: grpc.StatusCode, details: Any = ()) -> None:
        self.users = users
        self.code = code
        self.details = details
        self.pause_seconds = 0.0
        self.request_ids: list[str] = []
        self.seconds_left: list[float] = []

    async def create(self, request: CreateUserRequest, context: Any) -> User:
        """Forward the call; drop the response to the first."""
        self.request_ids.append(request.request_id)
        self.seconds_left.append(context.time_remaining())
        created = await self.users.CreateUser(request)
        if len(self.request_ids) == 1:
            await asyncio.sleep(self.pause_seconds)
            await context.abort(self.code, "the answer was lost", trailing_metadata=self.details)
        return created


@asynccontextmanager
async def proxied(lossy: LossyProxy, kind: Kind) -> AsyncIterator[UserServiceAsyncStub]:
    """Yield a stub that calls through the proxy."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        lossy.create, CreateUserRequest.FromString, User.SerializeToString
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("roster.v1.UserService", {"CreateUser": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with users_of(kind, f"127.0.0.1:{port}") as stub:
        yield stub
    await server.stop(None)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_retried_write_is_applied_once(
    users: UserServiceAsyncStub, kind: Kind, code: grpc.StatusCode
) -> None:
    """The response was lost; the retry has the same request_id, so it gets the first response."""
    lossy = LossyProxy(users, code)
    async with proxied(lossy, kind) as stub:
        created = await stub.CreateUser(CreateUserRequest(user=ADA))

    first, second = lossy.request_ids
    assert first == second != ""
    assert await users.GetUser(GetUserRequest(email=ADA.email)) == created


async def test_retries_a_write_with_an_unknown_outcome(users: UserServiceAsyncStub, kind: Kind) -> None:
    """The retry has the same request_id, so it gets the first response; both have one deadline."""
    status = status_from_error(OutcomeUnknown("the connection broke during the commit"))
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    lossy = LossyProxy(users, grpc.StatusCode.INTERNAL, details)
    lossy.pause_seconds = 0.2
    async with proxied(lossy, kind) as stub:
        created = await stub.CreateUser(CreateUserRequest(user=ADA), timeout=5)

    first, second = lossy.request_ids
    assert first == second != ""
    assert (
        lossy.seconds_left[1] <= lossy.seconds_left[0] - lossy.pause_seconds + 0.05
    )  # of clocks and rounding
    assert await users.GetUser(GetUserRequest(email=ADA.email)) == created


async def test_error_of_timed_out_write_has_its_request_id(kind: Kind) -> None:
    """The caller can repeat the write with the id that the client generated."""
    async with users_of(kind, "unix:/nowhere/roster.sock", timeout=0.1) as users:
        with pytest.raises(DeadlineExceeded) as late:
            await users.CreateUser(CreateUserRequest(user=ADA))
    assert UUID(str(late.value.facts["request_id"]))


async def test_keeps_a_request_id_of_the_caller(users: UserServiceAsyncStub) -> None:
    """The request of the caller is never modified."""
    named = CreateUserRequest(user=ADA, request_id=str(uuid4()))
    assert await users.CreateUser(named) == await users.CreateUser(named)

    unnamed = CreateUserRequest(user=User(email="alan@example.org"))
    await users.CreateUser(unnamed)
    assert unnamed.request_id == ""


async def test_yields_the_rows_of_all_pages(server: Server, users: UserServiceAsyncStub) -> None:
    """Rows come one by one, whatever the page size."""
    emails = [f"{number}@example.org" for number in range(5)]
    for email in emails:
        await users.CreateUser(CreateUserRequest(user=User(email=email)))

    async with channel(server.address) as connection:
        rows = pages(UserServiceStub(connection).ListUsers, ListUsersRequest(page_size=2))
        assert [user.email async for user in rows] == emails
    assert await asyncio.to_thread(list_emails, server.address) == emails


def list_emails(address: str) -> list[str]:
    """List users with the blocking client."""
    with blocking.channel(address) as connection:
        method = UserServiceStub(connection).ListUsers
        return [user.email for user in blocking.pages(method, ListUsersRequest(page_size=2))]


async def test_metadata_of_a_call_is_there() -> None:
    """The headers, which say what CreateUser did, and the trailers."""

    async def get(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("roster-outcome", "created"),))
        context.set_trailing_metadata((("made-by", "a test"),))
        return ADA.SerializeToString()

    def get_blocking(address: str) -> tuple[Any, Any]:
        with blocking.channel(address) as connection:
            _, call = UserServiceStub(connection).GetUser.with_call(GetUserRequest(id=1))
            return dict(call.initial_metadata()), dict(call.trailing_metadata())

    peer = grpc.aio.server()
    handlers: Any = {"GetUser": grpc.unary_unary_rpc_method_handler(get)}
    peer.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("roster.v1.UserService", handlers)])
    address = f"127.0.0.1:{peer.add_insecure_port('127.0.0.1:0')}"
    await peer.start()
    async with channel(address) as connection:
        call: Any = UserServiceStub(connection).GetUser(GetUserRequest(id=1))
        assert (await call).email == ADA.email
        found = [(dict(await call.initial_metadata()), dict(await call.trailing_metadata()))]
    found.append(await asyncio.to_thread(get_blocking, address))
    await peer.stop(None)

    for headers, trailers in found:
        assert headers["roster-outcome"] == "created"
        assert trailers["made-by"] == "a test"


async def test_threads_share_a_blocking_channel(server: Server) -> None:
    """Each write is applied once, and its response reaches its thread."""

    def create(users: UserServiceStub, number: int) -> str:
        return users.CreateUser(CreateUserRequest(user=User(email=f"{number}@example.org"))).email

    with blocking.channel(server.address) as connection, ThreadPoolExecutor(8) as threads:
        users = UserServiceStub(connection)
        loop = asyncio.get_running_loop()
        created = await asyncio.gather(
            *(loop.run_in_executor(threads, create, users, number) for number in range(64))
        )

    assert created == [f"{number}@example.org" for number in range(64)]


async def test_future_of_a_blocking_channel(server: Server) -> None:
    """It has the defaults of other calls, but raises gRPC's errors."""

    def results(users: UserServiceStub) -> tuple[User, grpc.StatusCode]:
        created = users.CreateUser.future(CreateUserRequest(user=ADA)).result()
        refused: Any = users.GetUser.future(GetUserRequest(id=created.id + 1)).exception()
        return created, refused.code()

    with blocking.channel(server.address) as connection:
        created, code = await asyncio.to_thread(results, UserServiceStub(connection))

    assert (created.email, code) == (ADA.email, grpc.StatusCode.NOT_FOUND)


async def test_stream_of_a_blocking_channel_is_a_call(server: Server) -> None:
    """As its type says: it can be cancelled, and has metadata."""
    await add_posts(server.database, await add_users(server.database) * 8, content="x" * (1 << 20))
    with blocking.channel(server.address) as connection:
        # Too much to be sent before it is read.
        responses: Any = PostServiceStub(connection).ExportPosts(ExportPostsRequest())
        await asyncio.to_thread(responses.initial_metadata)
        responses.cancel()

        assert responses.code() is grpc.StatusCode.CANCELLED


def test_closed_blocking_channel_is_not_a_lost_connection() -> None:
    """Retries would not help."""
    with blocking.channel("unix:/nowhere/roster.sock") as connection:
        users = UserServiceStub(connection)
        with pytest.raises(DeadlineExceeded):  # gRPC crashes if it sees a method only after the end
            users.GetUser(GetUserRequest(id=1), timeout=0)
    with pytest.raises(ValueError, match="closed"):
        users.GetUser(GetUserRequest(id=1))


@pytest.mark.parametrize("kind", ["asyncio"])
async def test_load_without_options_gets_a_load_id(users: UserServiceAsyncStub) -> None:
    """It can be resumed after the server restarts."""

    async def rows() -> AsyncIterator[User]:
        yield ADA

    opened, _, summary = [
        event async for event in BulkLoader(users.BulkCreateUsers, BulkCreateUsersRequest).run(rows())
    ]
    assert isinstance(opened, BulkOpened)
    assert opened.load_id
    assert isinstance(summary, BulkSummary)
    assert summary.created == 1


async def test_fails_immediately_without_wait_for_ready(kind: Kind) -> None:
    """With it, the call waits for a server until its deadline."""
    async with users_of(kind, "unix:/nowhere/roster.sock", wait_for_ready=False) as users:
        with pytest.raises(Disconnected, match=f"^{NO_SOCKET}$"):
            await users.GetUser(GetUserRequest(id=1))
    async with users_of(kind, "unix:/nowhere/roster.sock", timeout=0.1) as users:
        with pytest.raises(DeadlineExceeded, match=f"^{NO_SOCKET}; waited 0.1 s for one$"):
            await users.GetUser(GetUserRequest(id=1))


def test_all_errors_come_from_one_module() -> None:
    """A caller who handles a missing user and a missing server needs no second import."""
    kinds = {name for name, value in vars(errors).items() if _is_error(value)}
    kinds |= {name for name, value in vars(client_errors).items() if _is_error(value)}

    assert {"UserNotFound", "DeadlineExceeded", "Disconnected", "ProxyRefused"} <= kinds
    assert kinds - {"UnknownError"} <= set(client.__all__)


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, errors.RosterError)
