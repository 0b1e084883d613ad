"""What a caller is told when the database is busy, slow or gone, and that the next call is served."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from grpc import StatusCode
from sqlalchemy import func, insert, make_url, select, text

from roster.v1.bulk_pb2 import BulkLoad
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import engine, migrations
from service.db.engine import Database
from service.errors import OutcomeUnknown
from service.server import Server
from service.settings import Settings
from service.users.model import User as UserRow
from tests.errors import refusal
from tests.postgres import PostgresServer

# Far beyond every time-out of the server's: who waits so long got no status.
TIMEOUT_SECONDS = 20
CREATE = CreateUserRequest(user=User(email="ada@example.org"))


@asynccontextmanager
async def serving(database_url: str, **options: Any) -> AsyncIterator[tuple[Server, UserServiceStub]]:
    """Serve a database with settings of the test's own; yield the server and a client."""
    server = Server(Settings(database_url=database_url, listen="127.0.0.1:0", **options))
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield server, UserServiceStub(channel)
    await server.stop(grace=0)


def narrow(database_url: str) -> AbstractAsyncContextManager[tuple[Server, UserServiceStub]]:
    """Serve with one connection, for which nobody waits long."""
    return serving(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2)


@asynccontextmanager
async def row_locked(database_url: str, id: int) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Hold a user's row, as a transaction elsewhere would."""
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await connection.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", id)
        yield connection
    await connection.close()


async def create(users: UserServiceStub) -> int:
    return (await users.CreateUser(CREATE)).id


def renamed(id: int) -> UpdateUserRequest:
    return UpdateUserRequest(user=User(id=id, full_name="Ada"))


async def test_an_exhausted_pool_is_told_within_its_timeout(database_url: str) -> None:
    """A write that gets no connection, or on SQLite no turn, may be tried again; then it works."""
    async with narrow(database_url) as (server, users):
        async with server.database.begin() as session:
            await session.execute(select(1))
            refused = await refusal(users.CreateUser(CREATE, timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "POOL_EXHAUSTED")
        assert refused.retry_seconds == 1
        assert await create(users)


async def test_an_exhausted_pool_is_told_to_readers(database_url: str) -> None:
    """A read that gets no connection may be tried again; then it works."""
    async with narrow(database_url) as (server, users):
        async with server.database.read() as session:
            await session.execute(select(1))
            refused = await refusal(users.ListUsers(ListUsersRequest(), timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "POOL_EXHAUSTED")
        assert refused.retry_seconds == 1
        assert not (await users.ListUsers(ListUsersRequest())).users


async def test_a_statement_that_takes_too_long_is_told(postgresql_url: str) -> None:
    """A row that is locked elsewhere: the statement is given up after `statement_timeout`."""
    async with serving(postgresql_url, statement_timeout=0.3) as (_, users):
        id = await create(users)
        async with row_locked(postgresql_url, id):
            refused = await refusal(users.UpdateUser(renamed(id), timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.DEADLINE_EXCEEDED, "STATEMENT_TIMEOUT")
        assert refused.retry_seconds is None
        assert (await users.UpdateUser(renamed(id))).full_name == "Ada"


async def test_a_callers_deadline_ends_the_statement(postgresql_url: str) -> None:
    """Nothing of the call is left: no statement in the database, no connection out of the pool."""
    async with serving(postgresql_url) as (server, users):
        id = await create(users)
        async with row_locked(postgresql_url, id) as connection:
            refused = await refusal(users.UpdateUser(renamed(id), timeout=0.3))
            await server.drain.wait(TIMEOUT_SECONDS)
            busy = await connection.fetch(
                "SELECT query FROM pg_stat_activity WHERE application_name = 'roster' AND state <> 'idle'"
            )

        assert refused.code == StatusCode.DEADLINE_EXCEEDED
        assert not busy
        assert server.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert not (await users.GetUser(GetUserRequest(id=id))).full_name


async def test_sqlite_that_another_process_writes_is_unavailable(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is held for longer than the busy time-out: nothing was done, try again."""
    monkeypatch.setattr(engine, "SQLITE_BUSY_TIMEOUT_SECONDS", 0.1)
    other = Database(Settings(database_url=sqlite_url))
    async with serving(sqlite_url) as (_, users):
        async with other.begin() as session:
            await session.execute(select(1))
            refused = await refusal(users.CreateUser(CREATE, timeout=TIMEOUT_SECONDS))

        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert refused.retry_seconds == 1
        assert await create(users)
    await other.close()
