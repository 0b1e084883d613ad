"""A real server on a free port and a real channel to it, on both databases."""

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.v1.posts_pb2_grpc import PostServiceAsyncStub, PostServiceStub
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.server import Server
from tests.support.command import Client, Roster
from tests.support.mirror import MirrorRun
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import Postgres
from tests.support.server import serve
from tests.support.wire import Wire


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server of the test."""
    async with serve(database_url) as server:
        yield server


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the server."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def users(channel: grpc.aio.Channel) -> UserServiceAsyncStub:
    """The client of UserService."""
    return UserServiceStub(channel)


@pytest.fixture
def posts(channel: grpc.aio.Channel) -> PostServiceAsyncStub:
    """The client of PostService."""
    return PostServiceStub(channel)


@pytest.fixture
def roster(server: Server, tmp_path: Path) -> Roster:
    """The command `roster`, a client of the server."""
    return Roster(tmp_path / "files", server.address)


@pytest.fixture
def client(server: Server) -> Client:
    """Commands that call the server, inside the process of the test."""
    return Client(server.address)


@pytest.fixture
def mirror(server: Server, tmp_path: Path) -> MirrorRun:
    """A mirror inside the process of the test."""
    return MirrorRun(tmp_path, server.address)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def wire(
    request: pytest.FixtureRequest,
    postgres: Postgres,
    postgresql_template: str,
    pooler: PgBouncer | None,
    sqlite_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Wire]:
    """A client that sends any bytes, to a server that the tests of a module share."""
    async with AsyncExitStack() as stack:
        if request.param == "sqlite":
            url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path_factory.mktemp('wire'))}"
        else:
            url = await stack.enter_async_context(postgres.database(postgresql_template))
            url = pooler.url(url) if pooler else url
        server = await stack.enter_async_context(serve(url))
        yield Wire(stack.enter_context(grpc.insecure_channel(server.address)))


@pytest.fixture(params=["asyncio", "blocking"])
def kind(request: pytest.FixtureRequest) -> Any:
    """Which of the two Python clients a test uses."""
    return request.param
