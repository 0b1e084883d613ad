"""Limits of connections, of calls on one connection, and of the metrics port."""

import asyncio
import resource
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service import connections, metrics, scrapes
from service.settings import Settings
from tests.e2e.hostile.support import SCALE, Victim, victim
from tests.support.scrape import Scrape
from tests.support.server import FREE_PORT, serve

CALLS = 2000 * SCALE
SILENT = 1200  # more than the usual soft limit of 1,024 open files
USUAL_LIMIT = 1024
KIB_A_CONNECTION = 120
PATIENCE_SECONDS = 5
FREE = "127.0.0.1:0"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture
async def roster(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Victim]:
    """A server started with the usual limit of open files."""
    with open_files(USUAL_LIMIT):
        starting = victim(tmp_path, sqlite_url)
        server = await starting.__aenter__()
    with open_files(2 * SILENT):
        yield server
    await starting.__aexit__(None, None, None)


@contextmanager
def open_files(soft: int) -> Iterator[None]:
    """Set the soft limit of open files, which processes inherit."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft > hard:
        pytest.skip(f"the system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def connect(address: str, *said: bytes, tls: bool = False) -> socket.socket:
    """Connect, send some bytes, and stay silent."""
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=20)
    if tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        connection = context.wrap_socket(connection)
    for words in said:
        connection.sendall(words)
    return connection


async def call_on_new_connection(roster: Victim) -> grpc.StatusCode:
    """Return the code of a call on a new connection with a short deadline."""
    async with roster.channel("reader") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as answered:
            await UserServiceStub(channel).GetUser(GetUserRequest(id=1), timeout=PATIENCE_SECONDS)
    return answered.value.code()


@pytest.mark.parametrize("in_flight", [128, 500])
async def test_connection_accepts_hundreds_of_calls_in_flight(roster: Victim, in_flight: int) -> None:
    """None of them is refused as UNAVAILABLE or cancelled."""
    codes: Counter[grpc.StatusCode] = Counter()
    left = iter(range(CALLS))

    async def call(users: UserServiceAsyncStub) -> None:
        for _ in left:
            try:
                await users.GetUser(GetUserRequest(id=1))
            except grpc.aio.AioRpcError as error:
                codes[error.code()] += 1

    async with roster.channel("reader") as channel:
        users = UserServiceStub(channel)
        await asyncio.gather(*(call(users) for _ in range(in_flight)))

    assert codes == {grpc.StatusCode.NOT_FOUND: CALLS}


@pytest.mark.parametrize(
    ("count", "tls", "said"),
    [(SILENT, False, b""), (150 * SCALE, True, b""), (150 * SCALE, True, PREFACE)],
    ids=["silent", "handshake", "preface"],
)
async def test_silent_connections_do_not_block_others(
    roster: Victim, count: int, tls: bool, said: bytes
) -> None:
    """More than the usual limit of open files, each at a cost of some KiB."""
    before = roster.resident()
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(await asyncio.to_thread(connect, roster.address, said, tls=tls))
        for _ in range(5):
            assert await call_on_new_connection(roster) is grpc.StatusCode.NOT_FOUND
        assert (roster.resident() - before) * 1024 / count < KIB_A_CONNECTION


@pytest.mark.parametrize("said", [b"", PREFACE[:10]])
async def test_connection_succeeds_after_silent_ones_time_out(
    sqlite_url: str, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of connections a call fails immediately; a later attempt succeeds."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 20)
    monkeypatch.setattr(connections, "HANDSHAKE_SECONDS", 2)
    async with serve(sqlite_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        users = UserServiceStub(channel)
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(connect(server.address, said))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await users.GetUser(GetUserRequest(id=1))
            with pytest.raises(grpc.aio.AioRpcError) as answered:
                await users.GetUser(GetUserRequest(id=1), wait_for_ready=True, timeout=20)

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert answered.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "said", [b"", b"GET /metrics HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 20_000]
)
async def test_slow_clients_do_not_block_the_metrics_port(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They use no thread each, and the oldest is disconnected."""
    monkeypatch.setattr(scrapes, "SECONDS", 1000)  # so that the oldest is not closed for its time
    address, close = metrics.serve(Settings(metrics_listen=FREE_PORT))
    threads = threading.active_count()
    with ExitStack() as stack:
        dawdling = [stack.enter_context(connect(address, said)) for _ in range(300)]
        scraped = await Scrape.of(address)
        assert threading.active_count() <= threads + 1  # the one that scrapes
        closed = await asyncio.to_thread(dawdling[0].recv, 1000)
    await asyncio.to_thread(close)

    assert scraped.value("roster_ready") is not None
    assert closed == b"" or closed.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "said", [b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\xfe /\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n"]
)
async def test_metrics_port_refuses_invalid_http(said: bytes) -> None:
    """The next request is answered."""
    address, close = metrics.serve(Settings(metrics_listen=FREE_PORT))
    with connect(address, said) as connection:
        assert (await asyncio.to_thread(connection.recv, 1000)).startswith(b"HTTP/1.1 400 ")
    await Scrape.of(address)
    await asyncio.to_thread(close)


async def test_metrics_port_closes_unfinished_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops in the middle of its request holds a connection for a limited time."""
    monkeypatch.setattr(scrapes, "SECONDS", 0.2)
    address, close = metrics.serve(Settings(metrics_listen=FREE_PORT))
    with connect(address, b"GET /metrics HTTP/1.1\r\n") as connection:
        assert await asyncio.to_thread(connection.recv, 1000) == b""
    await asyncio.to_thread(close)


async def test_metrics_port_pauses_after_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause is as long as the response took; requests that come during it count as waiting."""
    monkeypatch.setattr(scrapes, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(scrapes, "perf_counter", count(step=0.5).__next__)
    has_begun = threading.Event()

    class Probe(Collector):
        def collect(self) -> Iterator[Metric]:
            has_begun.set()
            return iter(())

    registry = CollectorRegistry()
    registry.register(Probe())
    server = scrapes.ScrapeServer("127.0.0.1", 0, registry)
    address, request = f"127.0.0.1:{server.port}", b"GET /metrics HTTP/1.1\r\n\r\n"
    with connect(address, request) as first:
        assert await asyncio.to_thread(has_begun.wait, 20)
        with connect(address, request) as second:
            refused = await asyncio.to_thread(second.recv, 1000)
        answered = await asyncio.to_thread(first.recv, 1000)
    await asyncio.to_thread(server.close)

    assert refused.startswith(b"HTTP/1.1 503 ")
    assert answered.startswith(b"HTTP/1.1 200 ")
