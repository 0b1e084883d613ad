"""Connections to a server that another one replaces, and commits that no standby confirms."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest
from sqlalchemy import text

from roster.errors import DatabaseUnavailable, OutcomeUnknown, UserNotFound
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import migrations
from service.db.connect import Connection
from service.db.engine import Database
from service.db.failover import IDENTIFY, IDENTIFY_BY_TIME, Failover
from service.db.reads import Reader
from service.health import Health
from service.settings import Settings
from service.users.model import User as UserRow
from service.users.repository import UserRepository
from tests.support.errors import refusal
from tests.support.replication import Cluster
from tests.support.server import serve

SLEEP = text("SELECT pg_sleep(600)")
LOCK = text("SELECT pg_advisory_xact_lock(1)")
CREATE = text("CREATE TABLE written ()")
CANCEL_WAITS = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
ENOUGH_SECONDS = 20  # shorter than the statement timeout


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """A primary with a synchronous standby."""
    async with Cluster() as cluster:
        yield cluster


@asynccontextmanager
async def watched(url: str, **settings: Any) -> AsyncIterator[Database]:
    """Open a database, as the server does."""
    database = Database(Settings(database_url=url, **settings))
    watching = asyncio.create_task(database.watch_forever())
    try:
        yield database
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await database.close()


async def look(database: Database) -> bool:
    """Look for a server that has replaced the one of the open connections, as after a doubt."""
    return await failover_of(database)._close_replaced()


def failover_of(database: Database) -> Failover:
    assert database._engines.failover
    return database._engines.failover


@asynccontextmanager
async def statement_in_flight(database: Database) -> AsyncIterator[asyncio.Task[None]]:
    """Execute a statement that does not end."""
    begun = asyncio.Event()

    async def execute() -> None:
        async with database.begin() as session:
            await session.connection()
            begun.set()
            await session.execute(SLEEP)

    task = asyncio.create_task(execute())
    await begun.wait()
    yield task
    task.cancel()
    await asyncio.wait([task])


async def test_doubt_ends_statements_on_a_server_that_was_replaced(cluster: Cluster) -> None:
    """All connections are stuck, so the failing health check is the only sign."""
    async with (
        watched(cluster.url(), pool_size=1, max_overflow=0) as database,
        statement_in_flight(database) as stuck,
    ):
        cluster.primary.stall()
        await cluster.promote(cluster.standbys[0])
        health = Health(database, [])
        async with asyncio.timeout(ENOUGH_SECONDS):
            await health.check_database()
            with pytest.raises(DatabaseUnavailable):
                await stuck
            await database.ping()


async def test_new_connection_ends_statements_on_a_server_that_was_replaced(cluster: Cluster) -> None:
    """Without a doubt: other calls succeed, and so do health checks."""
    async with watched(cluster.url()) as database, statement_in_flight(database) as stuck:
        cluster.primary.stall()
        await cluster.promote(cluster.standbys[0])
        async with asyncio.timeout(ENOUGH_SECONDS):
            async with database.bulk() as session:
                await session.execute(CREATE)
            with pytest.raises(DatabaseUnavailable):
                await stuck


async def test_connection_is_closed_in_the_middle_of_a_statement(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two messages, Parse and Bind: the lookup is sent again, on another connection."""
    prepare: Any = Connection._get_statement  # type: ignore[attr-defined]
    closed: list[Any] = []

    async def prepare_and_lose(self: Any, *arguments: Any, **options: Any) -> Any:
        statement = await prepare(self, *arguments, **options)
        if not closed:
            closed.append(self)
            database_failover._close_older(replace(database_failover._servers[self], timeline=99))
        return statement

    await asyncio.to_thread(migrations.upgrade, cluster.url())
    async with watched(cluster.url()) as database:
        database_failover = failover_of(database)
        await database.ping()
        monkeypatch.setattr(Connection, "_get_statement", prepare_and_lose)
        with pytest.raises(UserNotFound):
            await Reader(database, UserRepository, by=(UserRow.id,)).get(1)
    assert closed[0].is_closed()


async def test_closed_connection_is_replaced_before_it_is_used(cluster: Cluster) -> None:
    """No call fails because of the idle connections that a failover has closed."""
    async with watched(cluster.url()) as database:
        await database.ping()
        failover = database._engines.failover
        assert failover
        for connection in [*failover._servers]:
            connection.terminate()
        async with database.begin() as session:
            await session.execute(CREATE)


async def test_primary_is_found_among_several_hosts(cluster: Cluster) -> None:
    """Without `target_session_attrs`, and although the standby comes first."""
    (standby,) = cluster.standbys
    async with (
        watched(cluster.url(standby, cluster.primary)) as database,
        database.begin() as session,
    ):
        await session.execute(CREATE)


async def test_old_primary_that_comes_back_gets_no_connection(cluster: Cluster) -> None:
    """It comes first in the URL and accepts writes, which would be lost."""
    old, (standby,) = cluster.primary, cluster.standbys
    async with watched(cluster.url(old, standby)) as database:
        old.stall()
        await cluster.promote(standby)
        async with database.begin() as session:
            await session.execute(CREATE)
        old.resume()
        for _ in range(10):  # connections that are open at the same time
            async with database.begin() as session, database.bulk() as another:
                for each in (session, another):
                    port = await each.scalar(text("SELECT current_setting('port')::int"))
                    assert port == standby.url.port


async def test_role_without_the_right_is_asked_less(cluster: Cluster) -> None:
    """It can use the database all the same."""
    await cluster.primary.execute(
        "CREATE ROLE plain LOGIN; REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
    )
    url = cluster.url().replace("postgres@", "plain@")
    async with watched(url) as database:
        await database.ping()
        assert await look(database)
        servers = [*failover_of(database)._servers.values()]
    assert servers
    assert not any(server.is_known for server in servers)


@pytest.mark.parametrize(
    ("error", "query"),
    [
        (asyncpg.InsufficientPrivilegeError, IDENTIFY_BY_TIME),
        (asyncpg.UndefinedFunctionError, IDENTIFY_BY_TIME),
        (asyncpg.QueryCanceledError, IDENTIFY),
        (asyncpg.ObjectNotInPrerequisiteStateError, IDENTIFY),  # promoted or demoted at this moment
    ],
)
async def test_only_a_missing_right_or_function_is_remembered(
    error: type[asyncpg.PostgresError], query: str
) -> None:
    """Other errors end by themselves."""

    class Failing:
        def is_closed(self) -> bool:
            return False

        async def fetchrow(self, _: str) -> None:
            raise error("as a test")

    failover = Failover("postgresql://postgres@127.0.0.1/postgres")
    assert await failover._identify(Failing()) is None
    assert failover._query == query


async def test_slow_statement_on_the_same_server_goes_on(cluster: Cluster) -> None:
    """Doubts about the primary do not end it."""
    async with watched(cluster.url()) as database, statement_in_flight(database) as slow:
        assert await look(database)
        async with database.bulk() as session:
            await session.execute(CREATE)
        assert not slow.done()


async def test_write_that_meets_a_read_only_server_finds_the_new_primary(cluster: Cluster) -> None:
    """The old one still answers, as one does that its administrator has set read-only."""
    async with watched(cluster.url(target_session_attrs="read-write")) as database:
        await database.ping()
        old = cluster.primary
        await cluster.promote(cluster.standbys[0])
        old.configure(default_transaction_read_only="on")
        old.reload()
        while await old.fetch("SHOW default_transaction_read_only") != "on":
            pass
        async with asyncio.timeout(ENOUGH_SECONDS):
            while True:
                try:
                    async with database.begin() as session:
                        await session.execute(CREATE)
                except DatabaseUnavailable:
                    await asyncio.sleep(0.01)
                else:
                    break
    assert await cluster.primary.fetch("SELECT to_regclass('written') IS NOT NULL")


async def test_health_check_ends_in_time_while_the_database_is_stalled(cluster: Cluster) -> None:
    """The cancelled query does not end."""
    async with watched(cluster.url(cluster.primary)) as database:
        await database.ping()
        cluster.primary.stall()
        health = Health(database, [])
        async with asyncio.timeout(ENOUGH_SECONDS):
            await health.check_database()
            await health.check_database()
        assert health._failures == 2
        cluster.primary.resume()


async def test_commit_without_a_standby_is_not_acknowledged(cluster: Cluster) -> None:
    """Not even if it is repeated; once the standby has it, the answer is the first one."""
    url = cluster.url(cluster.primary)
    (standby,) = cluster.standbys
    await asyncio.to_thread(migrations.upgrade, url)
    request = CreateUserRequest(user=User(email="ada@example.org"), request_id=str(uuid4()))
    async with serve(url) as server, grpc.aio.insecure_channel(server.address) as connection:
        users = UserServiceStub(connection)
        standby.stall()
        for _ in range(2):
            call = asyncio.create_task(refusal(users.CreateUser(request)))
            while not call.done():
                await cluster.primary.fetch(CANCEL_WAITS)
            refused = await call
            assert refused.reason == OutcomeUnknown.reason
            assert refused.message.startswith("no standby of the database has confirmed the commit")
        standby.resume()
        assert (await users.CreateUser(request)).email == "ada@example.org"
        assert await standby.fetch("SELECT count(*) FROM users") == 1
