"""Bad input to every RPC gets a status that names field and reason, never UNKNOWN or INTERNAL."""

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


def test_table_has_every_rpc() -> None:
    """New RPCs need their bad input here."""
    assert set(TABLE) == set(RPCS)
    assert all(TABLE.values())


@on_sqlite
@pytest.mark.parametrize(("rpc", "request_", "reason", "field"), ROWS)
async def test_refuses_bad_input(wire: Wire, rpc: str, request_: Any, reason: str, field: str) -> None:
    """The status has reason and field, but not the value; the next call is answered."""
    messages = request_ if isinstance(request_, list) else [request_]

    refused = await refusal(wire.call(rpc, *messages))

    assert refused.code == StatusCode.INVALID_ARGUMENT
    assert (refused.reason, refused.fields) == (reason, [field] if field else [])
    assert_is_readable(refused)
    assert SECRET.encode() not in refused.status.SerializeToString().lower()
    assert not set(re.findall(r"\d{10,}", repr(request_))) & set(re.findall(r"-?\d+", refused.message))
    await assert_serves(wire)


@on_sqlite
@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("bytes_", [b"\xff", b"\x0a\x05ab", b"\x00", b"\x7b" * 101 + b"\x7c" * 101])
async def test_refuses_malformed_messages(wire: Wire, rpc: str, bytes_: bytes) -> None:
    """Random bytes, a truncated message, and one nested over 100 deep; the error names the message."""
    refused = await refusal(wire.call(rpc, bytes_))

    assert_is_malformed(refused, rpc)
    await assert_serves(wire)


@on_sqlite
async def test_reads_messages_nested_100_deep(wire: Wire) -> None:
    """Unknown fields are skipped up to this depth."""
    assert await wire.call("BatchGetUsers", b"\x08\x01" + b"\x7b" * 100 + b"\x7c" * 100)


OUTPUT_ONLY = {"roster.v1.User.posts", "roster.v1.Post.author"}  # no request has them


def texts(message: Descriptor, *path: FieldDescriptor) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Yield the path to each text of a message, into each message type once."""
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (*path, field)
        elif field.message_type and field.message_type not in [step.message_type for step in path]:
            yield from texts(field.message_type, *path, field)


def encoded(path: tuple[FieldDescriptor, ...], value: bytes) -> bytes:
    """Return a message with only this field, of up to 127 bytes."""
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
    """In every text of every request."""
    refused = await refusal(wire.call(rpc, encoded(path, SECRET.encode() + b"\xff")))

    assert_is_malformed(refused, rpc)
    await assert_serves(wire)


@on_sqlite
async def test_refuses_a_message_over_the_receive_limit(wire: Wire) -> None:
    """The library refuses it before it is parsed, for all methods."""
    refused = await refusal(wire.call("CreateUser", bytes(MAX_RECEIVED_BYTES + 1)))

    assert refused.code == StatusCode.RESOURCE_EXHAUSTED
    await assert_serves(wire)


@on_sqlite
async def test_reports_all_violations_at_once(wire: Wire) -> None:
    """A caller who fills in a form corrects it once."""
    user = {"email": "", "full_name": "\0", "password": "\0", "hashed_password": "x"}
    refused = await refusal(wire.call("CreateUser", {"user": user}))

    wrong = ["user.email", "user.full_name", "user.password", "user.hashed_password", "user.password"]
    assert refused.fields == wrong
    assert (await refusal(wire.call("CreatePost", {}))).fields == ["post.author_id", "post.title"]


@on_sqlite
async def test_reports_violations_up_to_the_trailer_limit(wire: Wire) -> None:
    """Metadata is limited to 16 KiB: with 400 violations the call would be RESOURCE_EXHAUSTED."""
    refused = await refusal(wire.call("BatchGetUsers", {"ids": [0] * 1000}))

    assert refused.code == StatusCode.INVALID_ARGUMENT
    assert refused.fields == [f"ids[{position}]" for position in range(50)]


def assert_is_malformed(refused: Refusal, rpc: str) -> None:
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert RPCS[rpc].input_type.full_name in refused.message
    assert SECRET not in refused.message
    assert_is_readable(refused)


def assert_is_readable(refused: Refusal) -> None:
    """Check that the message is one short sentence, the same in the status and its details."""
    assert re.fullmatch(r"[^\n]{10,249}", refused.message)
    assert ". " not in refused.message
    assert refused.status.message == refused.message
    assert refused.status.code == refused.code.value[0]
    assert refused.detail(ErrorInfo).domain == "roster"


async def assert_serves(wire: Wire) -> None:
    assert await wire.call("BatchGetUsers", {"ids": [1]})
