"""The server as a whole: start, stop, and what it says of itself."""

import pytest

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from service.settings import Settings


async def test_serves_what_it_stored(users: UserServiceStub) -> None:
    """A user who was created can be read."""
    created = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))

    assert await users.GetUser(GetUserRequest(id=created.id)) == created


async def test_refuses_a_port_that_is_taken(server: Server) -> None:
    """A second server on the same port says so instead of sharing it in silence."""
    second = Server(Settings(database_url=server.settings.database_url, listen=server.address))

    with pytest.raises(OSError, match="is another server there already"):
        await second.start()
    await second.database.close()
