"""Limits of a caller and of the server, neither of which ever refuses a health check."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import GetPostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, ExportUsersRequest, GetUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.errors import refusal
from tests.support.server import serve

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
TIMEOUT_SECONDS = 20


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of the server, a parameter of each test."""
    return dict(request.param)


@pytest.fixture
async def server(sqlite_url: str, limits: dict[str, Any]) -> AsyncIterator[Server]:
    """A server with small limits."""
    async with serve(sqlite_url, **limits) as server:
        yield server


@pytest.fixture
async def held(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncio.Event]:
    """A GetUser in flight until the event is set."""
    begun, may_end = asyncio.Event(), asyncio.Event()
    get = server.users.get

    async def waiting(*arguments: Any) -> Any:
        begun.set()
        await may_end.wait()
        return await get(*arguments)

    monkeypatch.setattr(server.users, "get", waiting)
    call = asyncio.ensure_future(refusal(users.GetUser(GetUserRequest(id=1))))
    await begun.wait()
    yield may_end
    may_end.set()
    await call


async def health(channel: grpc.aio.Channel) -> int:
    return int((await HealthStub(channel).Check(HealthCheckRequest())).status)


@pytest.mark.parametrize("limits", [{"caller_calls": 1}], indirect=True)
async def test_calls_in_flight_are_limited_per_caller_and_method(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub, posts: PostServiceAsyncStub, held: asyncio.Event
) -> None:
    """Further calls of the method are refused until one ends; other methods have their own limit."""
    refused = await refusal(users.GetUser(GetUserRequest(id=1)))
    assert (refused.code, refused.reason, refused.retry_seconds) == (EXHAUSTED, "QUOTA_EXCEEDED", 1)
    assert (await refusal(posts.GetPost(GetPostRequest(id=1)))).reason == "POST_NOT_FOUND"
    assert await health(channel) == HealthCheckResponse.SERVING

    held.set()
    while (refused := await refusal(users.GetUser(GetUserRequest(id=1)))).reason == "QUOTA_EXCEEDED":
        pass
    assert refused.reason == "USER_NOT_FOUND"


@pytest.mark.parametrize("limits", [{"max_calls": 1}], indirect=True)
async def test_calls_in_flight_are_limited_per_server(
    channel: grpc.aio.Channel, posts: PostServiceAsyncStub, held: asyncio.Event
) -> None:
    """Further calls are UNAVAILABLE, so that clients try another server."""
    refused = await refusal(posts.GetPost(GetPostRequest(id=1)))

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
    assert refused.retry_seconds == 1
    assert await health(channel) == HealthCheckResponse.SERVING


@pytest.mark.parametrize("limits", [{"caller_streams": 1}], indirect=True)
async def test_open_streams_are_limited_per_caller_and_method(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub
) -> None:
    """Further streams of the method are refused until one ends; health can still be watched."""
    first: Any = users.BulkCreateUsers()
    await first.write(BulkCreateUsersRequest(options=BulkOptions()))
    assert (await first.read()).HasField("opened")

    refused = await refusal(users.BulkCreateUsers(iter(())).read())
    assert (refused.code, refused.reason, refused.retry_seconds) == (EXHAUSTED, "QUOTA_EXCEEDED", 1)
    assert [message.users async for message in users.ExportUsers(ExportUsersRequest())] == [[]]
    watches = [HealthStub(channel).Watch(HealthCheckRequest()) for _ in range(2)]
    assert {(await watch.read()).status for watch in watches} == {HealthCheckResponse.SERVING}

    await first.done_writing()
    assert (await first.read()).HasField("summary")
    assert await first.code() is grpc.StatusCode.OK
    second = users.BulkCreateUsers(iter([BulkCreateUsersRequest(finish=True)]))
    assert [event.WhichOneof("event") async for event in second] == ["opened", "summary"]


@pytest.mark.parametrize("limits", [{"caller_rate": 1}], indirect=True)
async def test_call_rate_is_limited_per_caller_and_method(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Further calls of the method are refused for a moment."""

    async def insisting() -> None:
        while True:
            await users.ListUsers(ListUsersRequest())

    refused = await refusal(insisting())
    assert (refused.code, refused.reason, refused.retry_seconds) == (EXHAUSTED, "RATE_LIMITED", 1)
    assert (await refusal(posts.GetPost(GetPostRequest(id=1)))).reason == "POST_NOT_FOUND"
    assert {await health(channel) for _ in range(3)} == {HealthCheckResponse.SERVING}


@pytest.mark.parametrize("limits", [{"stream_idle_timeout": 0.2}], indirect=True)
async def test_idle_stream_is_ended(users: UserServiceAsyncStub) -> None:
    """Acknowledged rows stay, and the load can be resumed."""
    stream: Any = users.BulkCreateUsers()
    rows = [User(email="ada@example.org")]
    await stream.write(BulkCreateUsersRequest(options=BulkOptions(load_id="staff"), users=rows))
    events = [await stream.read() for _ in range(2)]
    assert events[1].ack.created == 1

    refused = await asyncio.wait_for(refusal(stream.read()), TIMEOUT_SECONDS)
    assert (refused.code, refused.reason, refused.retry_seconds) == (EXHAUSTED, "QUOTA_EXCEEDED", 1)
    again = users.BulkCreateUsers(
        iter([BulkCreateUsersRequest(options=BulkOptions(load_id="staff"), finish=True)])
    )
    assert [event.summary.created async for event in again][-1] == 1
