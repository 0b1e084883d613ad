"""A real server on a free port and a real channel to it, on both databases."""

from collections.abc import AsyncIterator

import grpc
import pytest

from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from service.settings import Settings


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server of the test's own."""
    server = Server(Settings(database_url=database_url, listen="127.0.0.1:0"))
    await server.start()
    yield server
    await server.stop(grace=0)


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the server."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def users(channel: grpc.aio.Channel) -> UserServiceStub:
    """The client of UserService."""
    return UserServiceStub(channel)


@pytest.fixture
def posts(channel: grpc.aio.Channel) -> PostServiceStub:
    """The client of PostService."""
    return PostServiceStub(channel)
