"""Bad input to every RPC: a status that says where and what, never UNKNOWN or INTERNAL."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc.error_details_pb2 import ErrorInfo
from grpc import StatusCode

from service.server import MAX_RECEIVED_BYTES
from tests.support.bad_input import SECRET, TABLE
from tests.support.errors import Refusal, refusal
from tests.support.wire import RPCS, Wire

# All of it is refused before a database is asked.
on_sqlite = pytest.mark.parametrize("wire", ["sqlite"], indirect=True)

ROWS = [
    pytest.param(rpc, *bad, id=f"{rpc}-{bad[1]}-{bad[2]}-{number}")
    for rpc, table in TABLE.items()
    for number, bad in enumerate(table)
]


def test_the_table_has_every_rpc() -> None:
    """An RPC that is added to the contract gets its bad input here."""
    assert set(TABLE) == set(RPCS)
    assert all(TABLE.values())


@on_sqlite
@pytest.mark.parametrize(("rpc", "request_", "reason", "field"), ROWS)
async def test_refuses_bad_input(wire: Wire, rpc: str, request_: Any, reason: str, field: str) -> None:
    """The status has the reason and the field, tells nothing of the value, and the next call is answered."""
    messages = request_ if isinstance(request_, list) else [request_]

    refused = await refusal(wire.call(rpc, *messages))

    assert refused.code == StatusCode.INVALID_ARGUMENT
    assert (refused.reason, refused.fields) == (reason, [field] if field else [])
    assert_is_well_told(refused)
    assert SECRET.encode() not in refused.status.SerializeToString().lower()
    assert not set(re.findall(r"\d{10,}", repr(request_))) & set(re.findall(r"-?\d+", refused.message))
    await assert_serves(wire)


@on_sqlite
@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("bytes_", [b"\xff", b"\x0a\x05ab", b"\x00", b"\x7b" * 101 + b"\x7c" * 101])
async def test_refuses_bytes_that_are_no_message(wire: Wire, rpc: str, bytes_: bytes) -> None:
    """Garbage, a message that is cut off, and one nested over 100 deep; the message is named."""
    refused = await refusal(wire.call(rpc, bytes_))

    assert_is_malformed(refused, rpc)
    await assert_serves(wire)


@on_sqlite
async def test_reads_messages_nested_100_deep(wire: Wire) -> None:
    """Unknown fields are passed over, as deep as the limit."""
    assert await wire.call("BatchGetUsers", b"\x08\x01" + b"\x7b" * 100 + b"\x7c" * 100)


OUTPUT_ONLY = {"roster.v1.User.posts", "roster.v1.Post.author"}  # no request has them


def texts(message: Descriptor, *path: FieldDescriptor) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Yield the way to each text in a message, into messages of one type once."""
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (*path, field)
        elif field.message_type and field.message_type not in [step.message_type for step in path]:
            yield from texts(field.message_type, *path, field)


def encoded(path: tuple[FieldDescriptor, ...], value: bytes) -> bytes:
    """Return a message that has only this field; up to 127 bytes."""
    for field in reversed(path):
        value = bytes([field.number << 3 | 2, len(value)]) + value
    return value


@on_sqlite
@pytest.mark.parametrize(
    ("rpc", "path"),
    [
        pytest.param(rpc, path, id=f"{rpc}-{'.'.join(step.name for step in path)}")
        for rpc, method in RPCS.items()
        for path in texts(method.input_type)
        if not any(step.full_name in OUTPUT_ONLY for step in path)
    ],
)
async def test_refuses_text_that_is_not_utf8(wire: Wire, rpc: str, path: tuple[FieldDescriptor, ...]) -> None:
    """Every text of every request."""
    refused = await refusal(wire.call(rpc, encoded(path, SECRET.encode() + b"\xff")))

    assert_is_malformed(refused, rpc)
    await assert_serves(wire)


@on_sqlite
async def test_refuses_a_message_over_the_receive_limit(wire: Wire) -> None:
    """The answer is gRPC's own, before anything is parsed, the same for all methods."""
    refused = await refusal(wire.call("CreateUser", bytes(MAX_RECEIVED_BYTES + 1)))

    assert refused.code == StatusCode.RESOURCE_EXHAUSTED
    await assert_serves(wire)


@on_sqlite
async def test_tells_everything_wrong_with_the_fields_at_once(wire: Wire) -> None:
    """Whoever fills in a form should not have to send it five times."""
    user = {"email": "", "full_name": "\0", "password": "\0", "hashed_password": "x"}
    refused = await refusal(wire.call("CreateUser", {"user": user}))

    wrong = ["user.email", "user.full_name", "user.password", "user.hashed_password", "user.password"]
    assert refused.fields == wrong
    assert (await refusal(wire.call("CreatePost", {}))).fields == ["post.author_id", "post.title"]


@on_sqlite
async def test_tells_as_many_violations_as_fit_the_trailer(wire: Wire) -> None:
    """400 would be RESOURCE_EXHAUSTED instead: metadata has a limit of 16 KiB."""
    refused = await refusal(wire.call("BatchGetUsers", {"ids": [0] * 1000}))

    assert refused.code == StatusCode.INVALID_ARGUMENT
    assert refused.fields == [f"ids[{position}]" for position in range(50)]


def assert_is_malformed(refused: Refusal, rpc: str) -> None:
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert RPCS[rpc].input_type.full_name in refused.message
    assert SECRET not in refused.message
    assert_is_well_told(refused)


def assert_is_well_told(refused: Refusal) -> None:
    """One sentence, short enough for a terminal, and the same in the status and its details."""
    assert re.fullmatch(r"[^\n]{10,249}", refused.message)
    assert ". " not in refused.message
    assert refused.status.message == refused.message
    assert refused.status.code == refused.code.value[0]
    assert refused.detail(ErrorInfo).domain == "roster"


async def assert_serves(wire: Wire) -> None:
    assert await wire.call("BatchGetUsers", {"ids": [1]})
