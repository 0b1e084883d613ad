"""Clients behind a proxy that answers in HTTP: a sentence for a final answer, retries for a temporary one."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from roster.client import BulkLoader, Event, LoadInterrupted, channel
from roster.client.errors import ProxyRefused, ProxyUnavailable, is_retryable
from roster.errors import RosterError
from roster.v1.bulk_pb2 import BulkOpened, BulkOptions, BulkWriteResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, ExportUsersRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from tests.support.command import Roster
from tests.support.http2_proxy import Http2Proxy, ResettingProxy, listening

OPENED = BulkWriteResponse(opened=BulkOpened(max_rows=5000, max_bytes=4 << 20))
ROWS = [{"email": f"{number}@example.org", "full_name": "x" * 200} for number in range(2000)]
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: no call of a refused client reaches it."""
    return sqlite_url


async def users(count: int) -> AsyncIterator[User]:
    """Yield users of 200 bytes and more."""
    for number in range(count):
        yield User(email=f"{number}@example.org", full_name="x" * 200)


async def load(address: str, *, rows: int = 2000, retry_connect: bool = False, **options: int) -> list[Event]:
    """Load users through a proxy, without pauses."""
    async with channel(address, wait_for_ready=False) as connection:
        loader = BulkLoader(
            UserServiceStub(connection).BulkCreateUsers,
            BulkCreateUsersRequest,
            BulkOptions(load_id="staff"),
            first_pause_seconds=0,
            retry_connect=retry_connect,
            connection=connection,
            **options,
        )
        async with aclosing(loader.run(users(rows))) as events:
            return [event async for event in events]


async def failure(address: str, rpc: str) -> RosterError:
    """Return the error of a call through a proxy."""
    try:
        if rpc == "load":
            await load(address)
        async with channel(address, wait_for_ready=False) as connection:
            stub = UserServiceStub(connection)
            if rpc == "export":
                [answer async for answer in stub.ExportUsers(ExportUsersRequest())]
            await stub.GetUser(GetUserRequest(id=1))
    except LoadInterrupted as interrupted:
        return interrupted.cause
    except RosterError as error:
        return error
    raise AssertionError("the proxy let the call pass")


@pytest.mark.parametrize("rpc", ["get", "load"])
@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (302, "302 (Found) instead of the server; the proxy redirects calls"),
        (401, "401 (Unauthorized) instead of the server; the proxy must admit gRPC calls"),
        (403, "403 (Forbidden) instead of the server; the proxy must admit gRPC calls"),
        (404, "404 (Not Found) instead of the server; the proxy needs a route for the paths /roster.v1."),
        (413, "413 (Request Entity Too Large) instead of the server; a load is one long request: turn "),
        (418, "418 (I'm a Teapot) instead of the server"),
        (464, "464 instead of the server; the proxy needs a route"),
        (500, "500 (Internal Server Error) instead of the server"),
    ],
)
async def test_final_answer_of_a_proxy_is_not_retried(rpc: str, status: int, advice: str) -> None:
    """The error has the HTTP status, and what to change."""
    proxy = Http2Proxy(status)
    async with listening(proxy) as address:
        error = await failure(address, rpc)

    assert isinstance(error, ProxyRefused)
    assert not is_retryable(error)
    assert f"a proxy answered with HTTP {advice}" in error.message
    assert max(proxy.calls.values()) == 1


@pytest.mark.parametrize("rpc", ["get", "load"])
@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 522])
async def test_temporary_answer_of_a_proxy_is_retryable(rpc: str, status: int) -> None:
    """The mapping is that of gRPC's own document, with timeouts."""
    async with listening(Http2Proxy(status)) as address:
        error = await failure(address, rpc)

    assert isinstance(error, ProxyUnavailable)
    assert is_retryable(error)
    assert f"a proxy answered with HTTP {status}" in error.message


@pytest.mark.parametrize("rpc", ["get", "export", "load"])
async def test_page_without_grpc_status_is_named(rpc: str) -> None:
    """A login page can have the status 200."""
    async with listening(Http2Proxy(200)) as address:
        error = await failure(address, rpc)

    assert "something that is not a gRPC server answered" in error.message


async def test_load_retries_while_a_proxy_can_not_reach_the_server() -> None:
    """The number of retries is bounded."""
    proxy = Http2Proxy(502)
    async with listening(proxy) as address:
        with pytest.raises(LoadInterrupted, match="HTTP 502"):
            await load(address, retry_connect=True, max_retries=3)

    assert proxy.calls["/roster.v1.UserService/BulkCreateUsers"] == 4


async def test_load_stops_if_a_proxy_always_resets_its_stream() -> None:
    """Nginx has no other way to say 413 once the response has begun; 20 retries would take two minutes."""
    proxy = ResettingProxy(OPENED, 100_000)
    async with listening(proxy) as address:
        with pytest.raises(LoadInterrupted, match="client_max_body_size 0") as caught:
            await load(address)

    assert isinstance(caught.value.cause, ProxyRefused)
    assert proxy.calls["/roster.v1.UserService/BulkCreateUsers"] == 4


async def test_command_says_what_the_proxy_answered(roster: Roster) -> None:
    """The status is 2, and the sentence is the same as in Python."""
    name = roster.write("users.ndjson", *ROWS)
    async with listening(Http2Proxy(413)) as address:
        loaded = await roster.run("load", "users", name, "--address", address)
        listed = await roster.run("loads", "--address", address)
        exported = await roster.run("export", "users", "--address", address)

    for done in (loaded, listed, exported):
        assert (done.status, done.out) == (2, "")
        assert f"{address}: a proxy answered with HTTP 413" in done.err
        assert "no server answers" not in done.err


@asynccontextmanager
async def nginx(folder: Path, *directives: str) -> AsyncIterator[str]:
    """Run nginx with these directives of a server, and yield its address."""
    if not NGINX:
        pytest.skip("nginx is not installed")
    socket = folder / "nginx.sock"
    paths = [
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ]
    server = f"server {{ listen unix:{socket} http2; {' '.join(directives)} }}"
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log {folder}/access.log; {' '.join(paths)} {server} }}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(NGINX, "-p", folder, "-c", folder / "nginx.conf"), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with grpc.aio.insecure_channel(f"unix:{socket}") as connection:
            await connection.channel_ready()
        yield f"unix:{socket}"
    finally:
        process.terminate()
        await process.wait()


async def test_load_through_nginx_names_its_limit(server: Server, roster: Roster, tmp_path: Path) -> None:
    """Nginx takes 1 MiB by default, and any size with the advice of the error."""
    name = roster.write("users.ndjson", *ROWS * 5)
    passes = f"location / {{ grpc_pass grpc://{server.address}; }}"
    async with nginx(tmp_path, passes) as address:
        refused = await roster.run("load", "users", name, "--address", address)
    async with nginx(tmp_path, passes, "client_max_body_size 0;") as address:
        loaded = await roster.run("load", "users", name, "--address", address)

    assert refused.status == 2
    assert "turn off the limit of the proxy for request bodies (nginx: client_max_body_size 0)" in refused.err
    assert loaded.out.splitlines()[0].endswith("2,000 created, 0 updated, 0 skipped, 8,000 failed")
