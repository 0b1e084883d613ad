"""The start of a server, its addresses and its connections."""

import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.server import Server
from tests.support.server import serve


async def test_returns_what_it_stored(users: UserServiceAsyncStub) -> None:
    """A created user can be read."""
    created = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))

    assert await users.GetUser(GetUserRequest(id=created.id)) == created


async def test_refuses_a_taken_port(server: Server) -> None:
    """A second server on the port fails instead of sharing it."""
    with pytest.raises(OSError, match="is another server listening there"):
        async with serve(server.settings.database_url, listen=server.address):
            pass


async def test_refuses_a_taken_unix_socket(sqlite_url: str, tmp_path: Path) -> None:
    """Otherwise the first server would lose its clients to the second."""
    address = f"unix:{tmp_path}/roster.sock"
    async with serve(sqlite_url, listen=address):
        with pytest.raises(OSError, match="another server is listening there"):
            async with serve(sqlite_url, listen=address):
                pass


async def test_replaces_old_connection_but_not_its_streams(database_url: str) -> None:
    """The client reconnects for new calls, and a load continues on the old connection."""
    async with (
        serve(database_url, max_connection_age=0.2) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        users = UserServiceStub(channel)
        load: Any = users.BulkCreateUsers()
        await load.write(BulkCreateUsersRequest(users=[User(email="ada@example.org")]))
        assert (await load.read()).HasField("opened")
        assert (await load.read()).ack.created == 1
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

        await load.write(BulkCreateUsersRequest(users=[User(email="alan@example.org")], finish=True))
        assert (await load.read()).ack.created == 1
        assert (await load.read()).summary.created == 2
        assert (await users.GetUser(GetUserRequest(email="alan@example.org"))).id == 2


async def test_replaces_a_unix_socket_left_by_a_crash(sqlite_url: str, tmp_path: Path) -> None:
    """No process listens there."""
    path = str(tmp_path / "roster.sock")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(path)

    async with serve(sqlite_url, listen=f"unix:{path}") as server:
        assert server.address == f"unix:{path}"
