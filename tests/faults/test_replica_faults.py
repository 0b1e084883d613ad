"""Replicas that are down, slow, late, or of another cluster: the primary answers, and a metric says so."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from sqlalchemy import make_url, text

from roster.consistency import ANY, PRIMARY
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.consistency import ANYWHERE, Requirement, position_from_metadata
from service.db.base import ReadSession
from service.db.replica import Replica
from service.metrics import REPLICA_LAG, REPLICA_LAG_BYTES
from service.server import Server
from tests.support.errors import refusal
from tests.support.postgres import Postgres, PostgresServer
from tests.support.rows import add_users
from tests.support.server import serve
from tests.support.standby import ReplicatedDatabase, Standby
from tests.support.statements import Fetch, Statement, intercept_fetches
from tests.support.tokens import Answer, answer, at, counted

DEADLINE_SECONDS = 4


@asynccontextmanager
async def no_probes_by_itself() -> AsyncIterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.db.replica.PROBE_SECONDS", 3600)
        yield


@asynccontextmanager
async def calling(
    url: str, replica_url: str, **settings: Any
) -> AsyncIterator[tuple[Server, UserServiceAsyncStub]]:
    """A server with replicas, and a client of it. Only the test probes the replica, and so knows when."""
    async with (
        no_probes_by_itself(),
        serve(url, replica_url=replica_url, **settings) as server,
        grpc.aio.insecure_channel(server.address) as connection,
    ):
        yield server, UserServiceStub(connection)


async def create(users: UserServiceAsyncStub, name: str) -> Answer:
    return await answer(users.CreateUser(CreateUserRequest(user=User(email=f"{name}@example.org"))))


async def read(users: UserServiceAsyncStub, created: Answer, token: str = "") -> User:
    """Read a user with its token, or another one, within a deadline."""
    request = GetUserRequest(id=created.response.id)
    return await users.GetUser(request, timeout=DEADLINE_SECONDS, **at(token or created.token))


def replica_of(server: Server) -> Replica:
    assert server.replica is not None
    return server.replica


async def until_used(server: Server) -> None:
    """Probe until the replica is in use."""
    while not replica_of(server)._is_up:
        await replica_of(server).probe()


def moved(token: str, **parts: int) -> str:
    position = position_from_metadata([token])
    assert position
    return str(position._replace(**parts))


async def test_tokens_that_no_replica_can_meet(replicated: ReplicatedDatabase) -> None:
    """Of another cluster, of another timeline, above what exists: the primary answers, at once."""
    async with calling(replicated.url, replicated.replica_url) as (server, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        for reason, token in {
            "cluster": moved(ada.token, cluster=1),
            "timeline": moved(ada.token, timeline=2),
            "above": moved(ada.token, lsn=2**62),
        }.items():
            with counted() as counts:
                assert await read(users, ada, token) == ada.response
            assert counts == {"source=primary": 1, f"fallback={reason}": 1}
        # They have not kept the others from the replica, nor from waiting for it.
        with counted() as counts:
            assert await read(users, ada) == ada.response
        assert counts == {"source=replica": 1}
        assert not replica_of(server)._awaited


async def test_tokens_of_two_clusters_are_met_by_the_primary(replicated: ReplicatedDatabase) -> None:
    async with calling(replicated.url, replicated.replica_url) as (_, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        with counted() as counts:
            assert await read(users, ada, f"{ada.token} {moved(ada.token, cluster=1)}") == ada.response
        assert counts == {"source=primary": 1}


async def test_replica_that_is_down_is_left_out_until_it_is_back(replicated: ReplicatedDatabase) -> None:
    """The reads in flight and those after are answered; only the first ones have tried."""
    with Standby(replicated.standby.primary) as standby:
        async with calling(replicated.url, replicated.on(standby)) as (server, users):
            ada = await create(users, "ada")
            await standby.catch_up()
            assert await read(users, ada) == ada.response
            standby.stop("immediate")
            with counted() as counts:
                for token in (ada.token, ANY) * 3:
                    assert await read(users, ada, token) == ada.response
            assert counts["source=primary"] == 6
            assert counts["fallback=failed"] + counts["fallback=down"] == 6
            await replica_of(server).probe()
            with counted() as counts:
                await asyncio.gather(*(read(users, ada) for _ in range(50)))
            assert counts.keys() <= {"source=primary", "fallback=down"}

            standby.start()
            await until_used(server)
            with counted() as counts:
                assert await read(users, ada) == ada.response
            assert counts == {"source=replica": 1}


async def test_server_starts_without_its_replica(replicated: ReplicatedDatabase) -> None:
    """And is ready."""
    url = make_url(replicated.replica_url).set(port=1).render_as_string(hide_password=False)
    async with calling(replicated.url, url) as (server, users):
        ada = await create(users, "ada")
        with counted() as counts:
            assert await read(users, ada, ANY) == ada.response
        assert counts == {"source=primary": 1, "fallback=down": 1}
        await server.health.check_database()
        assert server.health._failures == 0


async def test_frozen_replica_costs_no_deadline(replicated: ReplicatedDatabase) -> None:
    """It accepts connections, and answers nothing: on open connections, and on new ones."""
    async with calling(replicated.url, replicated.replica_url) as (server, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        assert await read(users, ada) == ada.response
        with replicated.standby.frozen():
            with counted() as counts:
                found = await asyncio.gather(*(read(users, ada, token) for token in (ada.token, ANY) * 8))
            assert found == [ada.response] * 16
            assert counts["source=primary"] > 0
            assert counts["source=replica"] == 0
            for _ in range(3):
                await replica_of(server).probe()
                assert await read(users, ada) == ada.response
        await until_used(server)
        with counted() as counts:
            assert await read(users, ada) == ada.response
        assert counts == {"source=replica": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda users, **options: users.GetUser(GetUserRequest(email="ada@example.org"), **options),
        lambda users, **options: users.ListUsers(ListUsersRequest(), **options),
    ],
)
async def test_replica_that_freezes_during_a_read_gets_half_of_the_time(
    call: Callable[..., Awaitable[Any]], replicated: ReplicatedDatabase
) -> None:
    """The primary has the other half."""
    async with calling(replicated.url, replicated.replica_url) as (_, users):
        await create(users, "ada")
        await replicated.standby.catch_up()
        with ExitStack() as frozen, counted() as counts:
            freezing = [replicated.standby.frozen()]

            async def freeze_once(statement: Statement, fetch: Fetch) -> Any:
                if "FROM users" in statement.sql and freezing:
                    frozen.enter_context(freezing.pop())
                return await fetch()

            with intercept_fetches(freeze_once):
                await call(users, timeout=DEADLINE_SECONDS, **at(ANY))
        assert counts == {"source=primary": 1, "fallback=slow": 1}


async def test_short_deadlines_leave_the_replica_to_the_others(replicated: ReplicatedDatabase) -> None:
    """A caller with no time for a replica says nothing about it."""
    async with calling(replicated.url, replicated.replica_url) as (server, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        assert await read(users, ada) == ada.response
        for milliseconds in range(1, 40):
            request = GetUserRequest(id=ada.response.id)
            await answer(users.GetUser(request, timeout=milliseconds / 10_000, **at(ada.token)))
        assert replica_of(server)._is_up
        with counted() as counts:
            assert await read(users, ada) == ada.response
        assert counts["source=replica"] == 1


async def test_replica_of_another_cluster_is_never_read(replicated: ReplicatedDatabase) -> None:
    """Not even with `any`: it may hold the users of somebody else."""
    with PostgresServer() as other:
        await other.execute(f"CREATE DATABASE {make_url(replicated.url).database}")
        async with calling(replicated.url, replicated.on(other)) as (server, users):
            ada = await create(users, "ada")
            for token in (ada.token, ANY):
                with counted() as counts:
                    assert await read(users, ada, token) == ada.response
                assert counts == {"source=primary": 1, "fallback=down": 1}
            # Nor if only a new connection leads there.
            replica_of(server)._is_up = True
            with counted() as counts:
                assert await read(users, ada, ANY) == ada.response
            assert counts == {"source=primary": 1, "fallback=cluster": 1}


async def test_replica_on_an_older_timeline_does_not_count_as_newer(replicated: ReplicatedDatabase) -> None:
    """A standby of the old primary is ahead of the new one in bytes, and has none of its writes."""
    with Standby(replicated.standby.primary) as promoted:
        await promoted.promote()
        for _ in range(3):
            await replicated.standby.primary.execute("SELECT pg_switch_wal(); CREATE TABLE x(); DROP TABLE x")
        await replicated.standby.catch_up()
        async with calling(replicated.on(promoted), replicated.replica_url) as (_, users):
            ada = await create(users, "ada")
            with counted() as counts:
                assert await read(users, ada) == ada.response
            assert counts == {"source=primary": 1, "fallback=timeline": 1}


async def test_promoted_replica_answers_no_token_of_the_primary(replicated: ReplicatedDatabase) -> None:
    """Also on connections from before its promotion."""
    with Standby(replicated.standby.primary) as standby:
        async with calling(replicated.url, replicated.on(standby)) as (server, users):
            ada = await create(users, "ada")
            await standby.catch_up()
            with counted() as counts:
                assert await read(users, ada) == ada.response
            assert counts == {"source=replica": 1}
            await standby.promote()
            bob = await create(users, "bob")
            for _ in range(9):  # its position becomes greater than that of the write
                await standby.execute("SELECT pg_switch_wal(); CREATE TABLE x(); DROP TABLE x")
            with counted() as counts:
                assert await read(users, bob) == bob.response
            assert counts == {"source=primary": 1, "fallback=timeline": 1}
            # Nor, once it has been asked again, a read that accepts any replica.
            await replica_of(server).probe()
            with counted() as counts:
                assert await read(users, bob, ANY) == bob.response
            assert counts == {"source=primary": 1, "fallback=down": 1}


async def test_replica_follows_a_new_primary(replicated: ReplicatedDatabase) -> None:
    """Tokens of the new timeline are met by a standby that has followed it."""
    with Standby(replicated.standby.primary) as promoted, Standby(promoted) as follower:
        await promoted.promote()
        async with calling(replicated.on(promoted), replicated.on(follower)) as (server, users):
            ada = await create(users, "ada")
            assert position_from_metadata([ada.token]).timeline == 2  # type: ignore[union-attr]
            await follower.catch_up()
            await until_used(server)
            with counted() as counts:
                assert await read(users, ada) == ada.response
            assert counts == {"source=replica": 1}


async def test_timeline_without_the_right_to_see_the_receiver(replicated: ReplicatedDatabase) -> None:
    """It is that of the last restart point: until then the primary answers."""
    with Standby(replicated.standby.primary) as promoted, Standby(promoted) as follower:
        await promoted.promote()
        await promoted.execute("CREATE ROLE plain LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
        await follower.catch_up()
        url = make_url(replicated.on(follower)).set(username="plain").render_as_string()
        async with calling(replicated.on(promoted), url) as (server, users):
            ada = await create(users, "ada")
            await follower.catch_up()
            await until_used(server)
            with counted() as counts:
                assert await read(users, ada) == ada.response
            assert counts.keys() <= {"source=primary", "fallback=timeline", "source=replica"}
            await promoted.execute("CHECKPOINT")
            await follower.catch_up()
            await follower.execute("CHECKPOINT")
            with counted() as counts:
                assert await read(users, ada) == ada.response
            assert counts == {"source=replica": 1}


async def test_primary_counts_as_a_replica_that_has_caught_up(replicated: ReplicatedDatabase) -> None:
    """Such as with a URL that names all servers."""
    async with calling(replicated.url, replicated.url) as (_, users):
        ada = await create(users, "ada")
        with counted() as counts:
            assert await read(users, ada) == ada.response
        assert counts == {"source=replica": 1}


async def test_each_connection_is_checked_with_several_replicas(replicated: ReplicatedDatabase) -> None:
    """One of two has stopped replaying; reads that share a statement are not sent there."""
    with Standby(replicated.standby.primary) as late:
        await late.pause_replay()
        hosts = ",".join(f"127.0.0.1:{make_url(each.url).port}" for each in (late, replicated.standby))
        url = f"postgresql://postgres@{hosts}/{make_url(replicated.url).database}"
        async with calling(replicated.url, url) as (server, users):
            [id] = await add_users(server.database, 1)
            with counted() as counts:
                for number in range(10):
                    changed = UpdateUserRequest(user=User(id=id, full_name=f"Ada {number}"))
                    written = await answer(users.UpdateUser(changed))
                    await replicated.standby.catch_up()
                    calls: list[Any] = [
                        users.GetUser(GetUserRequest(id=id), **at(written.token)) for _ in range(16)
                    ]
                    calls += [users.ListUsers(ListUsersRequest(), **at(written.token)) for _ in range(16)]
                    for found in await asyncio.gather(*calls):
                        user = found if isinstance(found, User) else found.users[0]
                        assert user == written.response
            assert counts["fallback=behind"] > 0
            assert counts["source=replica"] > 0, counts


async def test_conflict_with_recovery_retries_on_the_primary(replicated: ReplicatedDatabase) -> None:
    """A statement that the standby cancels, to replay a lock of the primary."""
    async with calling(replicated.url, replicated.replica_url) as (server, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        await replicated.standby.execute("ALTER SYSTEM SET max_standby_streaming_delay = 10")
        await replicated.standby.execute("SELECT pg_reload_conf()")

        async def count_slowly(session: ReadSession) -> Any:
            slow = "CASE WHEN pg_is_in_recovery() THEN pg_sleep(30)::text END"
            return await session.scalar(text(f"SELECT count({slow}) + count(*) FROM users"))

        with counted() as counts:
            reading = asyncio.create_task(server.database.run(count_slowly, Requirement(ANYWHERE)))
            activity = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            while not await replicated.standby.fetch(activity):
                pass
            await execute(replicated, "BEGIN; LOCK TABLE users; COMMIT")
            assert await reading == 1
            assert await read(users, ada, ANY) == ada.response
        assert counts == {"source=primary": 1, "fallback=conflict": 1, "source=replica": 1}


async def execute(replicated: ReplicatedDatabase, statement: str) -> None:
    await Postgres(make_url(replicated.url)).execute(statement)


async def test_schema_that_is_not_replayed_yet(replicated: ReplicatedDatabase) -> None:
    """A replica without a column that a migration has added does not fail the reads of new code."""
    async with calling(replicated.url, replicated.replica_url) as (_, users):
        ada = await create(users, "ada")
        await replicated.standby.catch_up()
        await execute(replicated, "ALTER TABLE users RENAME COLUMN full_name TO other_name")
        await replicated.standby.catch_up()
        await replicated.standby.pause_replay()
        await execute(replicated, "ALTER TABLE users RENAME COLUMN other_name TO full_name")
        with counted() as counts:
            assert await read(users, ada, ANY) == ada.response
        assert counts == {"source=primary": 1, "fallback=failed": 1}


async def test_export_goes_on_at_the_primary(replicated: ReplicatedDatabase) -> None:
    """If the replica fails in the middle; no row is lost or doubled."""
    with Standby(replicated.standby.primary) as standby:
        async with calling(replicated.url, replicated.on(standby)) as (server, users):
            ids = await add_users(server.database, 50)
            token = (await create(users, "ada")).token
            await standby.catch_up()
            await until_used(server)
            exported = []
            with counted() as counts:
                async for page in users.ExportUsers(ExportUsersRequest(batch_size=3), **at(token)):
                    exported += [user.id for user in page.users]
                    if len(exported) == 12:
                        await asyncio.to_thread(standby.stop, "immediate")
            assert exported[:-1] == ids
            assert len(exported) == 51
            assert counts["source=replica"] > 0, counts


async def test_token_is_primary_if_the_position_cannot_be_read(replicated: ReplicatedDatabase) -> None:
    """A read that carries it goes there."""
    await replicated.standby.primary.execute("DROP ROLE IF EXISTS plain")
    await replicated.standby.primary.execute(
        "CREATE ROLE plain LOGIN IN ROLE pg_read_all_data, pg_write_all_data"
    )
    await execute(replicated, "REVOKE EXECUTE ON FUNCTION pg_current_wal_insert_lsn() FROM PUBLIC")
    await execute(replicated, "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO plain")
    url = make_url(replicated.url).set(username="plain").render_as_string()
    async with calling(url, replicated.replica_url) as (_, users):
        ada = await create(users, "ada")
        assert ada.token == PRIMARY
        with counted() as counts:
            assert await read(users, ada) == ada.response
        assert counts == {"source=primary": 1}


async def test_lag_grows_while_the_replica_is_down(replicated: ReplicatedDatabase) -> None:
    """And is 0 once it has caught up."""
    with Standby(replicated.standby.primary) as standby:
        async with calling(replicated.url, replicated.on(standby)) as (server, users):
            await create(users, "ada")
            await standby.catch_up()
            await replica_of(server).probe()
            assert (lag_bytes(), lag_seconds()) == (0, 0)
            standby.stop()
            await create(users, "bob")
            await replica_of(server).probe()
            first = lag_seconds()
            await replica_of(server).probe()
            assert lag_bytes() > 0
            assert lag_seconds() > first
            standby.start()
            await standby.catch_up()
            await until_used(server)
            await replica_of(server).probe()
            assert (lag_bytes(), lag_seconds()) == (0, 0)


def lag_bytes() -> float:
    return float(REPLICA_LAG_BYTES._value.get())


def lag_seconds() -> float:
    return float(REPLICA_LAG._value.get())


async def test_write_that_is_cut_off_while_its_token_is_read_is_not_sent_again(
    replicated: ReplicatedDatabase,
) -> None:
    """It is stored: a client without a request_id would write twice."""
    arrived = asyncio.Event()

    async def hold(statement: Statement, fetch: Fetch) -> Any:
        if "pg_walfile_name" in statement.sql and "is_replica" not in statement.sql and stopping:
            arrived.set()
            await asyncio.Event().wait()
        return await fetch()

    stopping: list[asyncio.Task[None]] = []
    with intercept_fetches(hold):
        async with calling(replicated.url, replicated.replica_url) as (server, users):
            stopping.append(asyncio.create_task(asyncio.sleep(0)))
            writing = asyncio.create_task(
                refusal(users.CreateUser(CreateUserRequest(user=User(email="a@b.org"))))
            )
            await arrived.wait()
            await server.stop(grace=0)
            assert (await writing).reason == "OUTCOME_UNKNOWN"
