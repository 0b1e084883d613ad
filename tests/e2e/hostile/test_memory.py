"""Attacks on the server's memory, by known and unknown callers.

Each attack states by how many MiB the server may grow. That is twice and more of what it takes, because a
process that shares its cores holds messages for longer. Without limits the first attack took 920 MiB, and
others up to 14 GiB. Within 30 s the memory is released.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from tests.e2e.hostile.support import MIB, SCALE, Victim, bystander, victim
from tests.support.raw_http2 import INITIAL_WINDOW_SIZE, Header, Http2Connection, connect, framed

GET_USER = "/roster.v1.UserService/GetUser"
CREATE_USER = "/roster.v1.UserService/CreateUser"
BULK_CREATE_USERS = "/roster.v1.UserService/BulkCreateUsers"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
MAX_MESSAGE = 5 * MIB - 1
STREAMS = 100  # calls on each connection
# What is kept for the next burst, and what Python does not give back.
KEPT_MIB = 96

Attack = Callable[[Victim], Awaitable[None]]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Victim]:
    """A server on SQLite that all attacks of this file share."""
    folder = tmp_path_factory.mktemp("memory")
    async with victim(
        folder, f"sqlite:///{folder / 'roster.db'}", ROSTER_HEALTH_LISTEN="127.0.0.1:0"
    ) as server:
        yield server


def field(number: int, value: bytes) -> bytes:
    """Return an encoded field of bytes."""
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """Return an encoded number."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


async def flood(victim: Victim, calls: Callable[[Http2Connection], Awaitable[Any]], connections: int) -> None:
    """Run calls on several connections at a time, until none of them makes progress for a second."""
    opened = [await connect(victim.address, victim.ca) for _ in range(connections)]
    try:
        async with asyncio.timeout(30):
            await asyncio.gather(*(calls(connection) for connection in opened))
            await asyncio.sleep(1)
    except TimeoutError:
        pass
    finally:
        for connection in opened:
            await connection.close()


def on_each_stream(
    path: str, body: bytes, *headers: Header, end: bool = False, streams: int = STREAMS
) -> Attack:
    """Return an attack that sends the same bytes on many streams of some connections."""

    async def attack(victim: Victim) -> None:
        async def one(connection: Http2Connection) -> None:
            await connection.send(connection.open(path, *headers), body, end=end)

        async def calls(connection: Http2Connection) -> None:
            await asyncio.gather(*(one(connection) for _ in range(streams)))

        await flood(victim, calls, 3 * SCALE)

    return attack


def bulk(message: bytes, *, streams: int = 8) -> Attack:
    """Return an attack by an admin who sends a message three times on several bulk streams."""

    async def attack(victim: Victim) -> None:
        async with victim.channel("admin") as channel:
            for _ in range(SCALE):
                await asyncio.gather(*(load(channel, message) for _ in range(streams)))

    return attack


async def load(channel: grpc.aio.Channel, message: bytes) -> None:
    """Send a message three times on a bulk stream, and read the responses."""
    call: Any = channel.stream_stream(BULK_CREATE_USERS)
    with suppress(grpc.aio.AioRpcError):  # refused, which is right too
        async for _ in call(iter([message] * 3)):
            pass


async def unread(victim: Victim) -> None:
    """Send messages on bulk streams whose windows leave no room for the acks."""
    token = (b"authorization", b"Bearer " + victim.token("admin").encode())
    rows = [User(email=f"user{number}@example.org", full_name="x" * 750) for number in range(5000)]
    options = BulkOptions(validate_only=True, return_ids=True)
    first = BulkCreateUsersRequest(options=options, users=rows).SerializeToString()
    others = BulkCreateUsersRequest(users=rows).SerializeToString()
    connection = await connect(victim.address, victim.ca, [(INITIAL_WINDOW_SIZE, 0)])

    async def one() -> None:
        stream = connection.open(BULK_CREATE_USERS, token)
        for message in (first, *[others] * 6):
            await connection.send(stream, framed(message))

    try:
        async with asyncio.timeout(20):
            await asyncio.gather(*(one() for _ in range(16)))
    except TimeoutError:
        pass
    finally:
        await connection.close()


ATTACKS: dict[str, tuple[Attack, int]] = {
    "calls of a stranger, with messages that never end": (
        on_each_stream(GET_USER, framed(bytes(MAX_MESSAGE - 1), MAX_MESSAGE)),
        150,
    ),
    "calls of a stranger, without messages": (on_each_stream(GET_USER, b""), 60),
    # gRPC keeps a message until it has all of it, and reads 64 of these at a time.
    "health checks with messages that never end": (
        on_each_stream(CHECK, framed(bytes(MAX_MESSAGE - 1), MAX_MESSAGE)),
        600,
    ),
    "health checks without messages": (on_each_stream(CHECK, b""), 60),
    "watches of names of 4 MiB": (on_each_stream(WATCH, framed(field(1, b"x" * 4 * MIB)), end=True), 800),
    "watches of unknown names": (on_each_stream(WATCH, framed(field(1, b"nobody")), end=True), 60),
    "more watches than a connection has": (on_each_stream(WATCH, framed(b""), end=True), 60),
    "2 million empty rows": (bulk(field(3, b"") * (2 * MIB)), 200),
    "2 million empty rows, and some bytes more": (bulk(field(3, b"") * (2 * MIB + 1000)), 200),
    "2 million posts inside a row": (bulk(field(3, field(8, b"") * (2 * MIB - 100))), 300),
    "2 million fields of no meaning": (bulk(b"\x78\x01" * (2 * MIB - 100)), 300),
    "2 million paths in a mask": (bulk(field(1, field(6, field(1, b"") * (2 * MIB - 100)))), 300),
    "bulk streams whose acks are not read": (unread, 900),
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack_uses_bounded_memory(server: Victim, name: str) -> None:
    """Another caller is answered meanwhile; then the memory is released."""
    attack, most = ATTACKS[name]
    before = server.resident()
    server.forget_peak()
    async with bystander(server) as other:
        await attack(server)
        taken = server.peak() - before

    print(f"{name}: {taken:.0f} MiB, others {other.p99 * 1000:.0f} ms")  # noqa: T201 - for the long run
    assert taken <= most
    assert other.failures == []
    assert await server.returns_to(before + KEPT_MIB), f"{server.resident():.0f} MiB, {before:.0f} before"


async def test_largest_response_fits_into_a_request(server: Victim) -> None:
    """A user whose posts a caller has read can be sent back with them."""
    async with server.channel("admin") as channel:
        call: Any = channel.unary_unary(CREATE_USER)
        post = field(8, field(2, b"t" * 1020))
        await call(field(1, field(2, b"ada@example.org") + post * 50))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(field(1, field(2, b"bob@example.org") + post * 3000))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 65,536 bytes" in (refused.value.details() or "")


async def test_incomplete_message_times_out(server: Victim) -> None:
    """Its call ends after ten seconds."""
    token = (b"authorization", b"Bearer " + server.token("reader").encode())
    connection = await connect(server.address, server.ca)
    stream = connection.open(GET_USER, token)
    await connection.send(stream, framed(b"", 100))
    async with asyncio.timeout(20):
        assert await connection.status(stream) == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    await connection.close()


def test_support_reads_the_memory_of_the_server(server: Victim, tmp_path: Path) -> None:
    """The figures are plausible for a process with Python and gRPC."""
    assert 50 < server.resident() <= server.peak() < 5000
