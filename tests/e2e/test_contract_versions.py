"""The client and servers of other releases: what one of them does not know does no harm."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from roster.client import BulkLoader, FailedPrecondition, Unavailable, Unsupported, channel, watch_changes
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkSummary, BulkWriteResponse
from roster.v1.changes_pb2 import Change, WatchChangesResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from tests.support.blocking import Kind, users_of

LATER_FIELD = b"\xba\x3e\x05later"  # number 999, of type string
ADA = User(id=1, email="ada@example.org")


def later(message: Message) -> bytes:
    """Return a message as a later server sends it: with a field that the client does not know."""
    return message.SerializeToString() + LATER_FIELD


def refusal(code: grpc.StatusCode, *, retry: bool = False) -> Status:
    """Return a status with a reason that the client does not know."""
    status = Status(code=code.value[0], message="user 1 is asleep")
    details: list[Message] = [ErrorInfo(domain="roster", reason="USER_ASLEEP", metadata={"user_id": "1"})]
    for detail in [*details, *([RetryInfo()] if retry else [])]:
        status.details.add().Pack(detail)
    return status


@asynccontextmanager
async def later_server(service: str, **methods: Callable[..., Any]) -> AsyncIterator[str]:
    """Run a server with these methods, which take and return bytes; yield its address."""
    make = {
        "GetUser": grpc.unary_unary_rpc_method_handler,
        "WatchChanges": grpc.unary_stream_rpc_method_handler,
        "BulkCreateUsers": grpc.stream_stream_rpc_method_handler,
    }
    handlers: Any = {name: make[name](method) for name, method in methods.items()}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"roster.v1.{service}", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_unknown_fields_are_ignored(kind: Kind) -> None:
    """The rest of the message is read."""

    async def get(request: bytes, context: Any) -> bytes:
        return later(ADA)

    async with later_server("UserService", GetUser=get) as address, users_of(kind, address) as users:
        user = await users.GetUser(GetUserRequest(id=1))

    assert (user.id, user.email) == (ADA.id, ADA.email)


async def test_unknown_reason_has_the_class_of_its_status_code(kind: Kind) -> None:
    """A caller who handles FailedPrecondition handles all that are to come."""

    async def get(request: bytes, context: Any) -> bytes:
        status = refusal(grpc.StatusCode.FAILED_PRECONDITION)
        details = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, status.message, details)
        raise AssertionError("aborted")

    async with later_server("UserService", GetUser=get) as address, users_of(kind, address) as users:
        with pytest.raises(FailedPrecondition) as refused:
            await users.GetUser(GetUserRequest(id=1))

    assert type(refused.value) is FailedPrecondition
    assert (refused.value.reason, refused.value.facts) == ("USER_ASLEEP", {"user_id": 1})


async def test_unknown_reason_is_retried_as_its_status_code(kind: Kind) -> None:
    """UNAVAILABLE, until the attempts are used up; RetryInfo says how long to wait after that."""
    attempts = 0

    async def get(request: bytes, context: Any) -> bytes:
        nonlocal attempts
        attempts += 1
        details = refusal(grpc.StatusCode.UNAVAILABLE, retry=True).SerializeToString()
        metadata = (("grpc-status-details-bin", details),)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "user 1 is asleep", metadata)
        raise AssertionError("aborted")

    async with later_server("UserService", GetUser=get) as address, users_of(kind, address) as users:
        with pytest.raises(Unavailable) as refused:
            await users.GetUser(GetUserRequest(id=1), timeout=5)

    assert (refused.value.reason, refused.value.retry_after_seconds) == ("USER_ASLEEP", 0)
    assert attempts > 1


async def test_rpc_that_the_server_does_not_have(server: Server) -> None:
    """An earlier server; the error is not retried."""
    async with channel(server.address) as connection:
        call: Any = connection.unary_unary(
            "/roster.v1.UserService/WakeUser",
            request_serializer=Empty.SerializeToString,
            response_deserializer=Empty.FromString,
        )
        with pytest.raises(Unsupported, match="does not know this RPC; is it of an earlier release"):
            await call(Empty())


async def test_watch_passes_over_unknown_changes() -> None:
    """They are changes of entities that this client does not have; the token moves past them."""

    async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        change = Change.FromString(LATER_FIELD)
        yield later(WatchChangesResponse(changes=[change, Change(user=ADA)], token="second"))
        await asyncio.sleep(60)

    async with (
        later_server("ChangeService", WatchChanges=watch) as address,
        channel(address) as connection,
        aclosing(watch_changes(connection)) as responses,
    ):
        response = await anext(responses)

    assert response.token == "second"
    assert [change.WhichOneof("change") for change in response.changes] == [None, "user"]


async def test_load_passes_over_unknown_responses() -> None:
    """A later server may send more kinds of them between the acks."""

    async def write(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield later(BulkWriteResponse(opened=BulkOpened(max_rows=10, max_bytes=1 << 20)))
        async for packed in requests:
            request = BulkCreateUsersRequest.FromString(packed)
            yield LATER_FIELD
            if request.users:
                yield later(BulkWriteResponse(ack=BulkAck(offset=0, next_offset=1, created=1)))
            if request.finish:
                summary = BulkSummary(state=BulkLoad.FINISHED, created=1, next_offset=1)
                yield later(BulkWriteResponse(summary=summary))
                return

    async def rows() -> AsyncIterator[User]:
        yield User(email=ADA.email)

    async with (
        later_server("UserService", BulkCreateUsers=write) as address,
        channel(address) as connection,
    ):
        method = UserServiceStub(connection).BulkCreateUsers
        events = [event async for event in BulkLoader(method, BulkCreateUsersRequest).run(rows())]

    assert [type(event) for event in events] == [BulkOpened, BulkAck, BulkSummary]
