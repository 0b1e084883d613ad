"""Statements that hang on a replica which otherwise answers, and commits with an unknown outcome."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import literal_column, select

from roster.consistency import ANY, PRIMARY
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.consistency import ANYWHERE, Requirement
from service.db.compiled import CompiledSelect
from service.db.connect import Connection
from service.db.engine import Database
from service.settings import Settings
from tests.faults.test_replica_faults import calling, create
from tests.support.errors import Refusal
from tests.support.rival import LOCK_COMMITS, delay_commits, rival
from tests.support.rows import add_users
from tests.support.standby import ReplicatedDatabase
from tests.support.statements import Fetch, Statement, intercept_fetches
from tests.support.tokens import answer, at, counted


@asynccontextmanager
async def locked_on_replica(replicated: ReplicatedDatabase) -> AsyncIterator[None]:
    """Lock the table of users on the standby only: its replay is paused after that of a lock."""
    async with rival(replicated.url) as other:
        await other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        # A commit sends it to the standby.
        await replicated.standby.primary.execute("SELECT pg_logical_emit_message(true, 'test', '')")
        await replicated.standby.catch_up()
        await replicated.standby.pause_replay()
        await other.rollback()
    try:
        yield
    finally:
        await replicated.standby.resume_replay()


async def test_caller_without_a_deadline_does_not_delay_the_others(replicated: ReplicatedDatabase) -> None:
    """Callers who share statements have different deadlines."""
    async with calling(replicated.url, replicated.replica_url) as (_, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        request = GetUserRequest(id=ada.response.id)
        async with locked_on_replica(replicated):
            patient = users.GetUser(request, **at(ANY))
            others = [users.GetUser(request, timeout=3, **at(ANY)) for _ in range(3)]
            others += [users.GetUser(request, timeout=0.9, **at(ANY)) for _ in range(3)]
            found = await asyncio.gather(patient, *others)
    assert found == [ada.response] * 7


async def test_statement_timeout_of_the_replica_leaves_the_read_to_the_primary(
    replicated: ReplicatedDatabase,
) -> None:
    """Also without a deadline, and in an export."""
    async with calling(replicated.url, replicated.replica_url, statement_timeout=1) as (_, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        async with locked_on_replica(replicated):
            with counted() as counts:
                listed = await users.ListUsers(ListUsersRequest(), **at(ANY))
                exported = [page async for page in users.ExportUsers(ExportUsersRequest(), **at(ANY))]
    assert [*listed.users] == [*exported[0].users] == [ada.response]
    # The replica does not reach the position of the token of the export either.
    assert counts == {"source=primary": 2, "fallback=slow": 2, "wait=behind": 1}


async def test_export_with_a_deadline_stays_on_the_replica(replicated: ReplicatedDatabase) -> None:
    """Each batch may take half of the time that is left, not half of the whole export."""

    async def fetch_slowly(statement: Statement, fetch: Fetch) -> Any:
        if "FROM users" in statement.sql:
            await asyncio.sleep(0.7)  # the third batch ends after 2.1 s
        return await fetch()

    async with calling(replicated.url, replicated.replica_url) as (server, users):
        await add_users(server.database, 3)
        await replicated.standby.catch_up()
        with counted() as counts, intercept_fetches(fetch_slowly):
            export = users.ExportUsers(ExportUsersRequest(batch_size=1), timeout=4, **at(ANY))
            pages = [page async for page in export]
    assert len(pages) == 3
    assert counts.keys() == {"source=replica"}


async def test_caller_at_its_share_of_the_replica_reads_on_the_primary(
    replicated: ReplicatedDatabase,
) -> None:
    """Where its connections are free."""
    settings = Settings(database_url=replicated.url, replica_url=replicated.replica_url, pool_timeout=0.1)
    database = Database(settings)
    replica = database.replica
    assert replica is not None
    await replicated.standby.catch_up()
    await replica.probe()
    query = CompiledSelect(select(literal_column("1").label("one")), database.engine.dialect)
    async with AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(replica.connection(Requirement(ANYWHERE), "ada"))
        with counted() as counts:
            [row] = await database.rows(query, share="ada", requirement=Requirement(ANYWHERE))
    assert row.one == 1
    assert counts["fallback=busy"] == counts["source=primary"] == 1
    await database.close()


def lose_connection(pid: int) -> None:
    """Break the connection of this process to a session of PostgreSQL, which does not notice."""
    for each in gc.get_objects():
        if type(each) is Connection and not each.is_closed() and each.get_server_pid() == pid:
            transport: Any = each._transport  # type: ignore[attr-defined]
            transport.abort()


async def bulk_create(users: UserServiceAsyncStub, name: str) -> Any:
    """Create a user by a stream without a load."""
    stream = users.BulkCreateUsers()
    await stream.write(BulkCreateUsersRequest(options=BulkOptions()))
    await stream.write(BulkCreateUsersRequest(users=[User(email=f"{name}@example.org")]))
    await stream.done_writing()
    return await answer(stream)


async def single_create(users: UserServiceAsyncStub, name: str) -> Any:
    return await answer(users.CreateUser(CreateUserRequest(user=User(email=f"{name}@example.org"))))


@pytest.mark.parametrize("write", [single_create, bulk_create])
async def test_token_of_an_unknown_outcome_is_primary(write: Any, replicated: ReplicatedDatabase) -> None:
    """The commit may happen after any position that could be read now."""
    await delay_commits(replicated.url)
    async with (
        calling(replicated.url, replicated.replica_url) as (_, users),
        rival(replicated.url) as other,
    ):
        await other.execute(LOCK_COMMITS)
        writing = asyncio.create_task(write(users, "ada"))
        lose_connection(await other.wait_for_blocked())
        written = await writing
        await other.commit()
    if written.error:
        assert Refusal(written.error).reason == "OUTCOME_UNKNOWN"
    assert written.token == PRIMARY
