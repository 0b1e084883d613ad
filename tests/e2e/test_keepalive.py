"""Keepalive pings of clients: those of other languages are allowed, floods are not."""

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest

from service import server as server_module
from service.server import OPTIONS, Server
from tests.support.raw_http2 import PING, Http2Connection, http2
from tests.support.server import serve

INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
FASTER = 50  # both the clients and the limit of the server
ENHANCE_YOUR_CALM = 11
GET_USER = "/roster.v1.UserService/GetUser"


@pytest.fixture
async def quick(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """A server whose limit on pings, and nothing else, is that many times shorter."""
    options = [(name, value // FASTER if name == INTERVAL else value) for name, value in OPTIONS]
    monkeypatch.setattr(server_module, "OPTIONS", options)
    async with serve(sqlite_url) as server:
        yield server


async def ping(connection: Http2Connection, number: int) -> None:
    """Send a ping, and wait for its acknowledgement or the end of the connection."""
    before = connection.pongs
    connection.frame(PING, 0, 0, struct.pack(">Q", number))
    await connection.until(lambda: connection.pongs > before or connection.goaway is not None)


@pytest.mark.parametrize(
    ("seconds", "is_busy"),
    [
        pytest.param(10, False, id="grpc-go and grpc-java at their minimum, between calls"),
        pytest.param(10, True, id="grpc-go and grpc-java at their minimum, during a stream"),
        pytest.param(20, False, id="grpc-core's own example"),
        pytest.param(30, True, id="our own client"),
    ],
)
async def test_allows_pings_of_other_clients(quick: Server, seconds: int, *, is_busy: bool) -> None:
    """Six pings are three times as many as the strikes after which a connection is closed."""
    async with http2(quick.address) as connection:
        if is_busy:
            connection.open("/grpc.health.v1.Health/Watch")
        for number in range(6):
            await ping(connection, number)
            await asyncio.sleep(seconds / FASTER)
        stream = connection.open(GET_USER, end=True)
        status = await connection.status(stream)

    assert connection.goaway is None
    assert status is not None


async def test_closes_a_connection_that_pings_without_pause(sqlite_url: str) -> None:
    """After the first ping and two strikes, with the server's real limit."""
    async with serve(sqlite_url) as server, http2(server.address) as connection:
        for number in range(4):
            await ping(connection, number)
        await connection.until(lambda: connection.goaway is not None)

    assert connection.goaway == ENHANCE_YOUR_CALM
