"""Limits of connections, of calls on one connection, and of the metrics port, tried as anybody could."""

import asyncio
import resource
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service import connections, metrics
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
    """A server that was started with the usual limit of open files."""
    with open_files(USUAL_LIMIT):
        starting = victim(tmp_path, sqlite_url)
        server = await starting.__aenter__()
    with open_files(2 * SILENT):
        yield server
    await starting.__aexit__(None, None, None)


@contextmanager
def open_files(soft: int) -> Iterator[None]:
    """Set the soft limit of open files, which programs inherit."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft > hard:
        pytest.skip(f"the system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def connect(address: str, *said: bytes, tls: bool = False) -> socket.socket:
    """Connect, say something, and nothing after that."""
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


async def newcomer(roster: Victim) -> grpc.StatusCode:
    """Return what a caller is answered who connects now, and does not wait long."""
    async with roster.channel("reader") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as answered:
            await UserServiceStub(channel).GetUser(GetUserRequest(id=1), timeout=PATIENCE_SECONDS)
    return answered.value.code()


@pytest.mark.parametrize("in_flight", [128, 500])
async def test_a_plain_client_has_so_many_calls_in_flight_on_one_connection(
    roster: Victim, in_flight: int
) -> None:
    """Each is answered: gRPC refuses none of them as UNAVAILABLE, and cancels none."""
    codes: Counter[grpc.StatusCode] = Counter()
    left = iter(range(CALLS))

    async def call(users: UserServiceStub) -> None:
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
async def test_silent_connections_keep_nobody_out(roster: Victim, count: int, tls: bool, said: bytes) -> None:
    """More than the usual limit of open files, and with TLS as many as time allows; each costs some KiB."""
    before = roster.resident()
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(await asyncio.to_thread(connect, roster.address, said, tls=tls))
        for _ in range(5):
            assert await newcomer(roster) is grpc.StatusCode.NOT_FOUND
        assert (roster.resident() - before) * 1024 / count < KIB_A_CONNECTION


@pytest.mark.parametrize("said", [b"", PREFACE[:10]])
async def test_a_caller_gets_in_after_the_silent_ones_have_had_their_time(
    sqlite_url: str, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of connections a caller is refused at once, and tries again with success."""
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
async def test_metrics_are_read_while_strangers_dawdle_on_their_port(said: bytes) -> None:
    """They cost no thread each, and the oldest are closed."""
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
async def test_what_is_not_http_is_refused_on_the_port_of_metrics(said: bytes) -> None:
    """And the next request is answered."""
    address, close = metrics.serve(Settings(metrics_listen=FREE_PORT))
    with connect(address, said) as connection:
        assert (await asyncio.to_thread(connection.recv, 1000)).startswith(b"HTTP/1.1 400 ")
    await Scrape.of(address)
    await asyncio.to_thread(close)
