"""Clients of addresses that are not what they should be: the error names the address and the cause."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
import pytest

from roster.client import DeadlineExceeded, Disconnected, tls_credentials
from roster.v1.users_pb2 import CreateUserRequest, ExportUsersRequest, GetUserRequest
from tests.support.authority import Authority
from tests.support.blocking import Kind, users_of

SECONDS = 0.4
SLACK_SECONDS = 0.6  # of a busy machine
EXPECTS_TLS = "it closed the connection; it may expect TLS, or a client certificate"
NO_TLS = "it does not speak TLS"
NO_HTTP2 = "it does not answer in HTTP/2: it is not a gRPC server, or it expects TLS"
AUTHORITY = Authority()
TRUSTED, OTHERS = tls_credentials(AUTHORITY.cert), tls_credentials(Authority().cert)


async def closed(stack: AsyncExitStack) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def silent(stack: AsyncExitStack) -> int:
    return int(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])


async def web(stack: AsyncExitStack) -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return server.server_port


async def plain(stack: AsyncExitStack) -> int:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return port


async def secure(stack: AsyncExitStack, name: str = "127.0.0.1") -> int:
    server = grpc.aio.server()
    pair = AUTHORITY.issue(name)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pair.key, pair.cert)]))
    await server.start()
    stack.push_async_callback(server.stop, None)
    return port


async def secure_for_another_name(stack: AsyncExitStack) -> int:
    return await secure(stack, "roster.example.org")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("listen", "credentials", "cause"),
    [
        (closed, None, "nothing listens there (connection refused)"),
        (closed, TRUSTED, "nothing listens there (connection refused)"),
        (web, None, NO_HTTP2),
        (web, TRUSTED, NO_TLS),
        (plain, TRUSTED, NO_TLS),
        (secure, None, EXPECTS_TLS),
        (secure, OTHERS, "its certificate is from a CA that these credentials don't trust"),
        (
            secure_for_another_name,
            TRUSTED,
            "its certificate is for another name; if that is right, pass it as server_name",
        ),
    ],
)
async def test_error_names_address_and_cause(
    listen: Any, credentials: Any, cause: str, kind: Kind, stack: AsyncExitStack
) -> None:
    """At once, or when the deadline is over if the call waits for a server."""
    address = f"127.0.0.1:{await listen(stack)}"
    expected = f"no server answers at {address}: {cause}"
    async with users_of(kind, address, credentials, wait_for_ready=False) as users:
        with pytest.raises(Disconnected) as lost:
            await users.GetUser(GetUserRequest(id=1))
        with pytest.raises(Disconnected) as broken:
            [page async for page in users.ExportUsers(ExportUsersRequest())]
    async with users_of(kind, address, credentials, timeout=SECONDS) as users:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded) as late:
            await users.CreateUser(CreateUserRequest())
        took = time.monotonic() - began

    assert (str(lost.value), str(broken.value)) == (expected, expected)
    assert str(late.value) == f"{expected}; waited {SECONDS} s for one"
    assert "request_id" in late.value.facts
    assert took < SECONDS + SLACK_SECONDS


async def test_export_does_not_wait_for_a_server(kind: Kind, stack: AsyncExitStack) -> None:
    """It has no deadline, so it would wait for ever."""
    address = f"127.0.0.1:{await closed(stack)}"
    async with users_of(kind, address) as users:
        with pytest.raises(Disconnected) as broken:
            [page async for page in users.ExportUsers(ExportUsersRequest())]

    assert str(broken.value) == f"no server answers at {address}: nothing listens there (connection refused)"


@pytest.mark.parametrize("credentials", [None, TRUSTED], ids=["plain", "tls"])
async def test_silent_server_is_named(credentials: Any, kind: Kind, stack: AsyncExitStack) -> None:
    """It accepts the connection and says nothing, as a debugger or a full disk does."""
    address = f"127.0.0.1:{await silent(stack)}"
    async with users_of(kind, address, credentials, timeout=SECONDS) as users:
        with pytest.raises(DeadlineExceeded) as late:
            await users.GetUser(GetUserRequest(id=1))

    assert str(late.value) == f"no server answers at {address}; waited {SECONDS} s for one"


@pytest.mark.parametrize("files", [{"ca": b"bad"}, {"key": b"", "certificate": b""}])
def test_files_that_are_not_in_pem_are_refused(files: Any) -> None:
    """Before anything is sent: gRPC would try to connect until the deadline."""
    with pytest.raises(ValueError, match=f"^{next(iter(files))} is not in PEM$"):
        tls_credentials(**files)


async def test_slow_server_is_not_said_to_be_away(kind: Kind, stack: AsyncExitStack) -> None:
    """The connection is there; only the answer is late."""

    async def never(request: object, context: object) -> None:
        await asyncio.sleep(60)

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(never)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("roster.v1.UserService", {"GetUser": handler})]
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    stack.push_async_callback(server.stop, None)
    async with users_of(kind, address, timeout=SECONDS) as users:
        with pytest.raises(DeadlineExceeded) as late:
            await users.GetUser(GetUserRequest(id=1))

    assert str(late.value) == f"{address} did not answer within {SECONDS} s"
