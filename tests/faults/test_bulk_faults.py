"""Bulk streams when the database or the client disappears during a batch."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.code_pb2 import UNAVAILABLE
from google.rpc.error_details_pb2 import RetryInfo
from sqlalchemy import func, select

from roster.v1.bulk_pb2 import BulkLoad, BulkOptions, BulkWriteResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, BulkDeleteUsersRequest, CreateUserRequest, UserKey
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db import migrations
from service.db.base import Session
from service.db.bulk import postgresql
from service.server import Server
from tests.support.postgres import PostgresServer
from tests.support.rival import Rival, rival, until
from tests.support.rows import add_posts, add_users
from tests.support.server import serve
from tests.support.users import list_names

# The bytes of a COPY that PostgreSQL has received so far.
RECEIVED = "SELECT max(bytes_processed) FROM pg_stat_progress_copy WHERE datname = current_database()"
# The last message of a backend that is terminated.
REASON = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
LAST_MESSAGE = b"E" + (4 + len(REASON)).to_bytes(4, "big") + REASON

# A client in a process of its own: one message acknowledged, another in progress.
CLIENT = """
import asyncio, sys, grpc
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub

async def load():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        call = UserServiceStub(channel).BulkCreateUsers()
        await call.write(BulkCreateUsersRequest(users=[User(email="ada@example.org")]))
        await call.read()
        await call.read()
        await call.write(BulkCreateUsersRequest(users=[User(email="bob@example.org")]))
        await call.read()

asyncio.run(load())
"""


@pytest.fixture
async def server(postgresql_url: str) -> AsyncIterator[Server]:
    """A server on PostgreSQL."""
    async with serve(postgresql_url) as server:
        yield server


@pytest.fixture
async def users(server: Server) -> AsyncIterator[UserServiceAsyncStub]:
    """A client of the server."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield UserServiceStub(channel)


@pytest.fixture
async def other(postgresql_url: str) -> AsyncIterator[Rival]:
    """A session that blocks every batch with Bob in it."""
    async with rival(postgresql_url) as other:
        await other.execute("INSERT INTO users (email) VALUES ('bob@example.org')")
        yield other


@asynccontextmanager
async def database_of_its_own() -> AsyncIterator[tuple[PostgresServer, str]]:
    """A migrated database on a server that can be stopped."""
    with PostgresServer() as postgres:
        async with postgres.database() as url:
            await asyncio.to_thread(migrations.upgrade, url)
            yield postgres, url


def batch(*names: str, **fields: Any) -> BulkCreateUsersRequest:
    return BulkCreateUsersRequest(users=[User(email=f"{name}@example.org") for name in names], **fields)


async def answer(call: Any) -> BulkWriteResponse:
    event = await call.read()
    assert isinstance(event, BulkWriteResponse)
    return event


async def holds_no_connection(server: Server) -> bool:
    return bool(server.database._engines.bulk.pool.checkedout() == 0)  # type: ignore[attr-defined]


async def test_broken_connection_commits_batch_once(
    server: Server, users: UserServiceAsyncStub, other: Rival
) -> None:
    """The client gets one ack, as without the failure."""
    call = users.BulkCreateUsers()
    await call.write(batch("ada", "bob", "cyd"))
    await answer(call)
    await other.execute(f"SELECT pg_terminate_backend({await other.wait_for_blocked()})")
    await other.rollback()

    ack = (await answer(call)).ack

    assert (ack.created, ack.next_offset, ack.HasField("error")) == (3, 3, False)
    assert sorted(await list_names(users)) == ["ada", "bob", "cyd"]
    await until(lambda: holds_no_connection(server))


async def test_broken_connection_deletes_batch_once(server: Server, users: UserServiceAsyncStub) -> None:
    """The first attempt rolls back, posts included; a later row for a user still finds none."""
    ids = await add_users(server.database, 2)
    await add_posts(server.database, [ids[0], ids[0], ids[1]])
    keys = [UserKey(id=ids[0]), UserKey(email="user1@example.org"), UserKey(id=ids[0])]
    call = users.BulkDeleteUsers()
    async with rival(server.settings.database_url) as other:
        await other.execute(f"UPDATE posts SET version = 2 WHERE author_id = {ids[1]}")
        await call.write(BulkDeleteUsersRequest(users=keys))
        await answer(call)
        await other.execute(f"SELECT pg_terminate_backend({await other.wait_for_blocked()})")
        await other.rollback()

        ack = (await answer(call)).ack

    assert (ack.deleted, ack.deleted_posts, ack.HasField("error")) == (2, 3, False)
    assert [failure.reason for failure in ack.failures] == ["USER_NOT_FOUND"]
    assert await list_names(users) == []


async def test_connection_broken_during_large_copy(
    server: Server, users: UserServiceAsyncStub, other: Rival
) -> None:
    """PostgreSQL has received only some of the rows."""
    names = ["bob", *(f"user{number}" for number in range(3800))]
    async with server.database.bulk() as session:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        wire = driver._transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    call = users.BulkCreateUsers()
    name_of_1020_bytes = "\N{GRINNING FACE}" * 255
    large = [User(email=f"{name}@example.org", full_name=name_of_1020_bytes) for name in names]
    await call.write(BulkCreateUsersRequest(users=large))
    await answer(call)
    waiting = await other.wait_for_blocked()
    received = await other.count(RECEIVED)
    assert 0 < received < 1020 * len(names)
    await other.execute(f"SELECT pg_terminate_backend({waiting})")
    await other.rollback()

    ack = (await answer(call)).ack

    assert (ack.created, ack.next_offset) == (len(names), len(names))


async def test_connection_broken_during_look_up(
    server: Server, users: UserServiceAsyncStub, postgresql_url: str
) -> None:
    """The batch waits for the lock of a row that it will update."""
    await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
    options = BulkOptions(on_conflict=BulkOptions.UPDATE, update_mask=FieldMask(paths=["full_name"]))
    async with rival(postgresql_url) as other:
        await other.execute("UPDATE users SET version = version")
        call = users.BulkCreateUsers()
        await call.write(batch("ada", "bob", options=options))
        await answer(call)
        await other.execute(f"SELECT pg_terminate_backend({await other.wait_for_blocked()})")
        await other.rollback()

        ack = (await answer(call)).ack

    assert (ack.created, ack.updated, ack.next_offset) == (1, 1, 2)


async def test_connection_broken_before_copy(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is noticed before any row is sent."""
    copy = postgresql.insert_rows

    async def cut_off(session: Session, *rows: Any) -> None:
        monkeypatch.undo()
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        async with server.database.read() as other:
            await other.execute(select(func.pg_terminate_backend(driver.get_server_pid())))
        await until(lambda: _is_closed(driver))
        await copy(session, *rows)

    monkeypatch.setattr(postgresql, "insert_rows", cut_off)
    call = users.BulkCreateUsers()
    await call.write(batch("ada", "bob"))
    await answer(call)

    ack = (await answer(call)).ack

    assert (ack.created, ack.next_offset) == (2, 2)


async def _is_closed(driver: Any) -> bool:
    return bool(driver.is_closed())


async def test_connection_terminated_but_not_closed_yet(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's last message has arrived, the end of the connection has not."""

    def terminated(driver: Any, where: str | None) -> str:
        monkeypatch.undo()
        driver._protocol.data_received(LAST_MESSAGE)
        return str(driver._format_copy_where(where))

    monkeypatch.setattr(asyncpg.Connection, "_format_copy_where", terminated)  # called just before COPY
    call = users.BulkCreateUsers()
    await call.write(batch("ada", "bob"))
    await answer(call)

    ack = (await answer(call)).ack

    assert (ack.created, ack.next_offset) == (2, 2)
    await until(lambda: holds_no_connection(server))


async def test_stream_survives_restart_of_database(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three attempts the ack has an error. Once the database is back, the stream continues."""
    monkeypatch.setattr(Server, "_delete_expired", lambda _: asyncio.sleep(3600))  # it would warn as well
    async with database_of_its_own() as (postgres, url), serve(url) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = UserServiceStub(channel).BulkCreateUsers()
            await call.write(batch("ada", "bob"))
            _, written = await answer(call), await answer(call)

            await asyncio.to_thread(postgres.stop, "immediate")
            await call.write(batch("cyd"))
            refused = (await answer(call)).ack
            tries = [message.partition(":")[0] for message in caplog.messages]
            await asyncio.to_thread(postgres.start)
            await call.write(batch("cyd", offset=refused.next_offset, finish=True))
            again, summary = await answer(call), await answer(call)

        assert (written.ack.next_offset, refused.offset, refused.next_offset) == (2, 2, 2)
        assert refused.error.code == UNAVAILABLE
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in refused.error.details)
        assert tries == ["DATABASE_UNAVAILABLE"] * 3
        assert (again.ack.created, again.ack.next_offset) == (1, 3)
        assert (summary.summary.created, summary.summary.state) == (3, BulkLoad.FINISHED)
        async with rival(url) as other:
            assert await other.connection.fetchval("SELECT count(*) FROM users") == 3


async def test_cancelled_load_keeps_acknowledged_rows(
    server: Server, users: UserServiceAsyncStub, other: Rival
) -> None:
    """Nothing of the pending batch is stored. Its connection is free immediately."""
    call = users.BulkCreateUsers()
    await call.write(batch("ada"))
    _, acknowledged = await answer(call), await answer(call)
    await call.write(batch("bob"))
    await other.wait_for_blocked()

    call.cancel()

    assert acknowledged.ack.created == 1
    await only_ada_is_left(server, users, other)


async def test_killed_client_keeps_acknowledged_rows(
    server: Server, users: UserServiceAsyncStub, other: Rival
) -> None:
    """To the server it looks like the end of any stream."""
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, server.address)
    await other.wait_for_blocked()

    client.kill()

    await client.wait()
    await only_ada_is_left(server, users, other)


async def only_ada_is_left(server: Server, users: UserServiceAsyncStub, other: Rival) -> None:
    # Free while the other session still blocks the batch: it was cancelled, not completed.
    await until(lambda: holds_no_connection(server))
    await other.rollback()
    assert await list_names(users) == ["ada"]
    events = [event async for event in users.BulkCreateUsers(iter([batch("bob", finish=True)]))]
    assert events[-1].summary.created == 1
