"""Errors while the database is busy, slow or away; the next call is answered."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal

import asyncpg
import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc import StatusCode
from sqlalchemy import func, insert, make_url, select

from roster.errors import OutcomeUnknown
from roster.v1.bulk_pb2 import BulkLoad
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db import engine, migrations
from service.db.engine import Database
from service.server import Server
from service.settings import Settings
from service.users.model import User as UserRow
from tests.support.errors import refusal
from tests.support.postgres import PostgresServer
from tests.support.server import serve

# Longer than every timeout of the server: a call that takes so long got no status.
TIMEOUT_SECONDS = 20
BLOCKED_UPDATES = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state <> 'idle' AND query LIKE 'UPDATE users%'
"""
CREATE = CreateUserRequest(user=User(email="ada@example.org"))


@asynccontextmanager
async def serve_users(
    database_url: str, **settings: Any
) -> AsyncIterator[tuple[Server, UserServiceAsyncStub]]:
    """Serve a database with some settings; yield the server and a client."""
    async with (
        serve(database_url, **settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield server, UserServiceStub(channel)


def narrow(database_url: str) -> AbstractAsyncContextManager[tuple[Server, UserServiceAsyncStub]]:
    """Serve with one connection and a short wait for it."""
    return serve_users(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2)


@asynccontextmanager
async def connected(database_url: str) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Connect to PostgreSQL directly."""
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def row_locked(database_url: str, id: int) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Lock a user's row in another transaction."""
    async with connected(database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", id)
        yield connection


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that tests may stop."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
async def own_database_url(own_postgres: PostgresServer) -> AsyncIterator[str]:
    """A migrated database on that server."""
    async with own_postgres.database() as url:
        await asyncio.to_thread(migrations.upgrade, url)
        yield url


async def create(users: UserServiceAsyncStub) -> int:
    return (await users.CreateUser(CREATE)).id


def renamed(id: int) -> UpdateUserRequest:
    return UpdateUserRequest(user=User(id=id, full_name="Ada"))


async def test_write_without_connection_is_retryable(database_url: str) -> None:
    """A write that gets no connection, or no turn on SQLite, fails within the timeout; a retry succeeds."""
    async with narrow(database_url) as (server, users):
        async with server.database.begin() as session:
            await session.execute(select(1))
            refused = await refusal(users.CreateUser(CREATE, timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "POOL_EXHAUSTED")
        assert refused.retry_seconds == 1
        assert await create(users)


async def test_read_without_connection_is_retryable(database_url: str) -> None:
    """A read that gets no connection fails within the timeout; a retry succeeds."""
    async with narrow(database_url) as (server, users):
        async with server.database.read() as session:
            await session.execute(select(1))
            refused = await refusal(users.ListUsers(ListUsersRequest(), timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "POOL_EXHAUSTED")
        assert refused.retry_seconds == 1
        assert not (await users.ListUsers(ListUsersRequest())).users


async def test_statement_on_locked_row_times_out(postgresql_url: str) -> None:
    """It ends after `statement_timeout`."""
    async with serve_users(postgresql_url, statement_timeout=0.3) as (_, users):
        id = await create(users)
        async with row_locked(postgresql_url, id):
            refused = await refusal(users.UpdateUser(renamed(id), timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.DEADLINE_EXCEEDED, "STATEMENT_TIMEOUT")
        assert refused.retry_seconds is None
        assert (await users.UpdateUser(renamed(id))).full_name == "Ada"


async def test_deadline_cancels_the_statement(postgresql_url: str) -> None:
    """No statement stays in the database, and no connection out of the pool."""
    async with narrow(postgresql_url) as (_, users):
        id = await create(users)
        async with row_locked(postgresql_url, id), connected(postgresql_url) as observer:
            refused = await refusal(users.UpdateUser(renamed(id), timeout=0.3))
            assert refused.code == StatusCode.DEADLINE_EXCEEDED

            async with asyncio.timeout(TIMEOUT_SECONDS):
                while await observer.fetchval(BLOCKED_UPDATES):
                    pass

        # The one connection is free again, and the lock did not let the update through.
        assert not (await users.GetUser(GetUserRequest(id=id))).full_name


async def test_locked_sqlite_is_unavailable(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the lock longer than the timeout; the call is retryable."""
    monkeypatch.setattr(engine, "SQLITE_BUSY_TIMEOUT_SECONDS", 0.1)
    other = Database(Settings(database_url=sqlite_url))
    async with serve_users(sqlite_url) as (_, users):
        async with other.begin() as session:
            await session.execute(select(1))
            refused = await refusal(users.CreateUser(CREATE, timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert refused.retry_seconds == 1
        assert await create(users)
    await other.close()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_stopped_database_is_unavailable_until_it_is_back(
    own_postgres: PostgresServer, own_database_url: str, mode: Literal["fast", "immediate"]
) -> None:
    """Calls fail immediately as retryable, and succeed once the database is back."""
    async with serve_users(own_database_url) as (_, users):
        id = await create(users)
        await asyncio.to_thread(own_postgres.stop, mode)
        refused = [
            await refusal(users.GetUser(GetUserRequest(id=id))),
            await refusal(users.UpdateUser(renamed(id))),
        ]
        await asyncio.to_thread(own_postgres.start)

        for error in refused:
            assert (error.code, error.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
            assert error.retry_seconds == 1
            assert str(make_url(own_database_url).port) not in error.message
        assert (await users.UpdateUser(renamed(id))).version == 2


async def test_bulk_stream_survives_a_stopped_database(
    own_postgres: PostgresServer, own_database_url: str
) -> None:
    """The ack has a retryable error; the message sent again is written."""
    batch = BulkCreateUsersRequest(users=[User(email="ada@example.org")], offset=0, finish=True)
    async with serve_users(own_database_url) as (_, users):
        stream = users.BulkCreateUsers(timeout=TIMEOUT_SECONDS)
        await stream.write(BulkCreateUsersRequest())
        assert (await read(stream)).HasField("opened")

        await asyncio.to_thread(own_postgres.stop)
        await stream.write(BulkCreateUsersRequest(users=batch.users))
        refused = (await read(stream)).ack.error
        await asyncio.to_thread(own_postgres.start)
        await stream.write(batch)
        written, end = await read(stream), await read(stream)

    assert refused.code == StatusCode.UNAVAILABLE.value[0]
    assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in refused.details)
    assert written.ack.created == 1
    assert end.summary.state == BulkLoad.FINISHED


async def read(stream: Any) -> Any:
    return await stream.read()


async def test_unresponsive_database_is_unavailable() -> None:
    """It accepts the connection and never answers; nothing was sent, so the call is retryable."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        url = f"postgresql://roster@127.0.0.1:{hole.getsockname()[1]}/roster"
        async with serve_users(url, connect_timeout=0.2) as (_, users):
            refused = await refusal(users.GetUser(GetUserRequest(id=1), timeout=TIMEOUT_SECONDS))

    assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")


async def test_write_to_a_standby_is_unavailable(postgresql_url: str) -> None:
    """After a failover a connection may lead to a read-only server; the call is retryable."""
    name = make_url(postgresql_url).database
    async with connected(postgresql_url) as connection:
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with serve_users(postgresql_url) as (_, users):
        refused = await refusal(users.CreateUser(CREATE))

    assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")


async def test_stale_prepared_statement_is_retryable(postgresql_url: str) -> None:
    """A column that changes its type invalidates each prepared statement of a connection once."""
    async with narrow(postgresql_url) as (_, users):
        id = await create(users)
        await users.UpdateUser(renamed(id))
        async with connected(postgresql_url) as connection:
            await connection.execute("ALTER TABLE users ALTER full_name TYPE varchar(300)")
        refused = await refusal(users.UpdateUser(renamed(id)))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert refused.retry_seconds == 1
        assert (await users.UpdateUser(renamed(id))).version == 3


async def test_lost_response_to_commit_is_unknown_outcome(postgresql_url: str) -> None:
    """The connection breaks during the commit, so a retry could write twice."""
    database = Database(Settings(database_url=postgresql_url))

    async def write_and_lose_the_connection() -> None:
        async with database.begin() as session:
            await session.execute(insert(UserRow).values(email="ada@example.org"))
            backend = await session.scalar(select(func.pg_backend_pid()))
            async with database.read() as other:
                await other.execute(select(func.pg_terminate_backend(backend, TIMEOUT_SECONDS * 1000)))

    with pytest.raises(OutcomeUnknown, match="send a request_id"):
        await write_and_lose_the_connection()

    async with database.begin() as session:
        assert await session.scalar(select(func.count()).select_from(UserRow)) == 0
    await database.close()
