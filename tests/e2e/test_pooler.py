"""Roster behind a real PgBouncer, in session and in transaction mode."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from sqlalchemy import Text, column, event, func, make_url, select, table, text

from roster.client import BulkLoader
from roster.errors import PoolExhausted
from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.posts_pb2 import CreatePostRequest, ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub, PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db.compiled import CompiledSelect
from service.db.engine import Database
from service.db.reads import Reader
from service.posts.repository import PostRepository
from service.settings import Settings
from tests.support.command import ROSTER, Ended, run, serving, waiting_to_serve
from tests.support.errors import refusal
from tests.support.fake_postgres import fake_postgres, reset_with
from tests.support.load_stream import load_once
from tests.support.pgbouncer import PgBouncer, direct, pgbouncer
from tests.support.rival import LOCK_COMMITS, Rival, delay_commits, rival, until
from tests.support.server import serve

CLIENTS = 32
LOADED, RESTORED = 3000, 20
TIMEOUT = 3  # seconds, of statements
# In session mode, each connection of Roster needs one of the four sessions of the pool.
SIZES: dict[str, dict[str, Any]] = {
    "transaction": {"pool_size": 32, "max_overflow": 0, "bulk_connections": 3},
    "session": {"pool_size": 2, "max_overflow": 0, "bulk_connections": 2},
}
SETTINGS = table("pg_settings", column("name", Text), column("setting", Text), column("source", Text))
PLANNER = {"enable_mergejoin": "off", "enable_hashjoin": "off"}
TIMEOUTS = {
    "statement_timeout": f"{TIMEOUT * 1000}",
    "idle_in_transaction_session_timeout": f"{TIMEOUT * 1000}",
    "lock_timeout": "0",
}
# What PgBouncer sets itself, so that a session fits each of its clients.
SET_BY_PGBOUNCER = {
    "application_name",
    "client_encoding",
    "DateStyle",
    "IntervalStyle",
    "standard_conforming_strings",
    "TimeZone",
}
BLOCKED = "SELECT count(*) FROM pg_locks WHERE NOT granted"


@pytest.fixture
def url(postgresql_url: str) -> str:
    """A database, without a pooler."""
    return direct(postgresql_url)


@pytest.fixture
def bouncer(url: str) -> Iterator[PgBouncer]:
    """A pooler in transaction mode with four sessions."""
    with pgbouncer(url, "transaction") as bouncer:
        yield bouncer


@pytest.fixture
async def pooled(url: str, bouncer: PgBouncer) -> AsyncIterator[Database]:
    """The `Database` behind the pooler."""
    settings = Settings(
        database_url=bouncer.url(url), database_pooler="transaction", statement_timeout=TIMEOUT
    )
    database = Database(settings)
    yield database
    await database.close()


@asynccontextmanager
async def channel(url: str, mode: str, **settings: Any) -> AsyncIterator[grpc.aio.Channel]:
    """Serve behind a pooler, and connect to the server."""
    async with (
        serve(url, database_pooler=mode, **SIZES[mode], **settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield channel


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_many_clients_share_four_sessions(mode: Any, url: str) -> None:
    """Calls, lists, gathered reads, password checks, loads with COPY and a restore, all at the same time."""
    sparing = {"password_memory": 1024, "pool_timeout": 60}
    with pgbouncer(url, mode) as bouncer:
        async with channel(bouncer.url(url), mode, **sparing) as connected:
            users, posts = UserServiceStub(connected), PostServiceStub(connected)
            await asyncio.gather(
                *(call(users, posts, number) for number in range(CLIENTS)),
                *(load(users, name) for name in ("first", "second")),
                restore(users),
            )
            page = await users.ListUsers(
                ListUsersRequest(page_size=1000, filter='email = "restored0@example.org"')
            )
            assert [user.id for user in page.users] == [1_000_000]
    connection = await asyncpg.connect(plain(url))
    assert await connection.fetchval("SELECT count(*) FROM users") == CLIENTS + 2 * LOADED + RESTORED
    await connection.close()


async def call(users: UserServiceAsyncStub, posts: PostServiceAsyncStub, number: int) -> None:
    email, password = f"call{number}@example.org", f"the password {number}"
    user = await users.CreateUser(CreateUserRequest(user=User(email=email, password=password)))
    for version in range(1, 4):
        assert await users.GetUser(GetUserRequest(id=user.id)) == user
        assert await users.GetUser(GetUserRequest(email=email)) == user
        change = User(id=user.id, version=version, full_name=f"Name {version}")
        user = await users.UpdateUser(UpdateUserRequest(user=change))
        assert user.version == version + 1
        post = await posts.CreatePost(CreatePostRequest(post=Post(author_id=user.id, title=f"{version}")))
        listed = await posts.ListPosts(ListPostsRequest(author_id=user.id))
        assert [row.title for row in listed.posts][-1] == post.title
        await users.ListUsers(ListUsersRequest(page_size=5))
    checked = await users.VerifyPassword(VerifyPasswordRequest(email=email, password=password))
    assert checked.user.id == user.id


async def load(users: UserServiceAsyncStub, name: str) -> None:
    rows = [User(email=f"{name}{number}@example.org") for number in range(LOADED)]
    ack = await load_once(users.BulkCreateUsers, BulkCreateUsersRequest(users=rows, finish=True))
    assert ack.created == LOADED


async def restore(users: UserServiceAsyncStub) -> None:
    rows = [User(id=1_000_000 + n, email=f"restored{n}@example.org", version=7) for n in range(RESTORED)]
    request = BulkCreateUsersRequest(options=BulkOptions(restore=True), users=rows, finish=True)
    assert (await load_once(users.BulkCreateUsers, request)).created == RESTORED


def plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


async def settings_in(session: Any) -> dict[str, str]:
    """Return the settings that Roster needs, as a transaction sees them."""
    names = [*TIMEOUTS, *PLANNER]
    statement = select(SETTINGS.c.name, SETTINGS.c.setting).where(SETTINGS.c.name.in_(names))
    return {row.name: row.setting for row in await session.execute(statement)}


async def test_settings_hold_in_each_transaction(pooled: Database) -> None:
    """Of calls, loads and reads, with and without SQLAlchemy; they survive any change of the session."""
    normal = TIMEOUTS | dict.fromkeys(PLANNER, "on")
    for _ in range(3):
        async with pooled.begin() as session, pooled.bulk() as bulk, pooled.read() as read:
            assert await settings_in(session) == normal
            assert await settings_in(bulk) == TIMEOUTS | PLANNER | {"lock_timeout": "5000"}
            assert await settings_in(read) == normal
        query = CompiledSelect(select(SETTINGS.c.name, SETTINGS.c.setting), pooled.engine.dialect)
        rows: dict[str, str] = {row.name: row.setting for row in await pooled.rows(query)}
        assert normal.items() <= rows.items()


@pytest.mark.parametrize("setting", ["none", "session"])
async def test_settings_hold_in_a_session(setting: Any, url: str) -> None:
    """They are sent after the startup, in which PgBouncer refuses them."""
    with pgbouncer(url, "session") as bouncer:
        own = f"{bouncer.url(url)}?options=-c%20search_path%3Dpublic,pg_temp%20-cwork_mem=5MB"
        database = Database(Settings(database_url=own, database_pooler=setting, statement_timeout=TIMEOUT))
        async with database.read() as session:
            assert TIMEOUTS.items() <= (await settings_in(session)).items()
            shown = [await session.scalar(text(f"SHOW {name}")) for name in ("search_path", "work_mem")]
            assert shown == ["public,pg_temp", "5MB"]
        await database.close()


async def test_nothing_is_left_in_the_sessions_of_the_pool(
    pooled: Database, url: str, bouncer: PgBouncer
) -> None:
    """Neither settings nor prepared statements, for other clients of the pooler."""
    lists = CompiledSelect(select(SETTINGS.c.name), pooled.engine.dialect)

    async def work() -> None:
        await pooled.rows(lists)
        async with pooled.bulk() as session:
            await session.execute(text("SELECT array_agg(n) FROM generate_series(1, 3) AS n"))
        with suppress(Exception):
            async with pooled.begin() as session:
                await session.execute(text("SELECT 1 / 0"))

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    async with AsyncExitStack() as stack:
        sessions = set()
        for _ in range(4):
            client = await asyncpg.connect(plain(bouncer.url(url)), statement_cache_size=0)
            stack.push_async_callback(client.close)
            await client.execute("BEGIN")
            sessions.add(await client.fetchval("SELECT pg_backend_pid()"))
            changed = await client.fetch("SELECT name FROM pg_settings WHERE source = 'session'")
            assert {name for (name,) in changed} <= SET_BY_PGBOUNCER
            assert await client.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
        assert len(sessions) == 4


async def test_cancelled_reads_end_in_the_database(
    pooled: Database, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that run keep their connections; one that waits for a session of the pooler loses its own."""
    closed = []
    event.listen(pooled.engine.sync_engine, "close", lambda *_: closed.append(1))
    await asyncio.gather(*(pooled.ping() for _ in range(8)))  # a connection that is opened would wait, too
    slow = CompiledSelect(select(func.pg_sleep(60).label("slept")), pooled.engine.dialect)

    async def read() -> None:
        async with pooled.read() as session:
            await session.execute(text("SELECT pg_sleep(60)"))

    connection = await asyncpg.connect(plain(url))
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    for turn, work in enumerate((lambda: pooled.rows(slow), read), 1):
        tasks = [asyncio.create_task(work()) for _ in range(5)]
        await until(lambda: is_true(connection, f"SELECT ({asleep}) = 4"))
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(TIMEOUT - 1):
            await asyncio.wait(tasks)
            await until(lambda: is_true(connection, f"SELECT ({asleep}) = 0"))
            await asyncio.gather(*(pooled.ping() for _ in range(8)))
        assert len(closed) == turn
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    await connection.close()


async def is_true(connection: Any, query: str) -> bool:
    return bool(await connection.fetchval(query))


async def test_killed_server_leaves_no_statement(url: str, bouncer: PgBouncer, tmp_path: Path) -> None:
    """PostgreSQL ends each at its timeout: calls, loads and reads, though nobody is left to cancel them."""
    environment = {"ROSTER_DATABASE_URL": bouncer.url(url), "ROSTER_DATABASE_POOLER": "transaction"}
    async with (
        rival(url) as other,
        serving(tmp_path, **environment, ROSTER_STATEMENT_TIMEOUT="2") as server,
        grpc.aio.insecure_channel(server.address) as connected,
    ):
        users = UserServiceStub(connected)
        await other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        load = BulkCreateUsersRequest(users=[User(email="row@example.org")], finish=True)
        calls: list[Awaitable[Any]] = [
            users.GetUser(GetUserRequest(id=1)),
            users.ListUsers(ListUsersRequest(filter='full_name = "Ada"')),
            users.CreateUser(CreateUserRequest(user=User(email="ada@example.org"))),
            load_once(users.BulkCreateUsers, load),
        ]
        ends = asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: is_true(other.connection, f"SELECT ({BLOCKED}) = 4"))
        server.signal(signal.SIGKILL)
        await ends
        await until(lambda: is_true(other.connection, f"SELECT ({BLOCKED}) = 0"))


async def kill_pooler(bouncer: PgBouncer, other: Rival, session: int) -> None:
    bouncer.stop(signal.SIGKILL)
    bouncer.start()


async def kill_clients(bouncer: PgBouncer, other: Rival, session: int) -> None:
    database = await other.connection.fetchval("SELECT current_database()")
    await bouncer.command(f"KILL {database}")
    await bouncer.command(f"RESUME {database}")


async def kill_session(bouncer: PgBouncer, other: Rival, session: int) -> None:
    await other.execute(f"SELECT pg_terminate_backend({session})")


FAULTS: list[Callable[[PgBouncer, Rival, int], Awaitable[None]]] = [kill_pooler, kill_clients, kill_session]


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Any:
    """A way in which a pooler drops a connection."""
    return request.param


async def test_connection_dropped_in_a_transaction(fault: Any, url: str, bouncer: PgBouncer) -> None:
    """Nothing is done; the call can be repeated at once."""
    async with channel(bouncer.url(url), "transaction") as connected, rival(url) as other:
        users = UserServiceStub(connected)
        await other.execute("INSERT INTO users (email) VALUES ('ada@example.org')")
        request = CreateUserRequest(user=User(email="ada@example.org"))
        call = asyncio.ensure_future(refusal(users.CreateUser(request)))
        await fault(bouncer, other, await other.wait_for_blocked())
        refused = await call
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert refused.retry_seconds is not None
        await other.rollback()
        created = await until(lambda: retried(users.CreateUser(request)))
        page = await users.ListUsers(ListUsersRequest())
        assert list(page.users) == [created]


async def retried(call: Awaitable[Any]) -> Any:
    """Return the answer of a call, or None if it has to be repeated."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.UNAVAILABLE:
            raise
        return None


async def test_connection_dropped_in_a_commit(fault: Any, url: str, bouncer: PgBouncer) -> None:
    """The answer says that the outcome is unknown."""
    await delay_commits(url)
    async with channel(bouncer.url(url), "transaction") as connected, rival(url) as other:
        users = UserServiceStub(connected)
        await other.execute(LOCK_COMMITS)
        request = CreateUserRequest(user=User(email="ada@example.org"))
        call = asyncio.ensure_future(refusal(users.CreateUser(request)))
        await fault(bouncer, other, await other.wait_for_blocked())
        assert (await call).reason == "OUTCOME_UNKNOWN"


async def test_named_load_resumes(fault: Any, url: str, bouncer: PgBouncer) -> None:
    """By itself: each row is stored once."""
    async with channel(bouncer.url(url), "transaction") as connected, rival(url) as other:
        await other.execute("INSERT INTO users (email) VALUES ('row250@example.org')")
        users = UserServiceStub(connected)
        options = BulkOptions(load_id="staff")
        loader = BulkLoader(
            users.BulkCreateUsers, BulkCreateUsersRequest, options, batch_rows=100, max_retries=20
        )
        events = []

        async def load() -> None:
            async with aclosing(loader.run(rows())) as stream:
                events.extend([event async for event in stream])

        async def rows() -> AsyncIterator[User]:
            for number in range(1000):
                yield User(email=f"row{number}@example.org")

        loading = asyncio.create_task(load())
        await fault(bouncer, other, await other.wait_for_blocked())
        await other.rollback()
        await loading
        acks = [event for event in events if isinstance(event, BulkAck)]
        assert acks[-1].next_offset == 1000
        async with rival(url) as check:
            stored = await check.connection.fetch("SELECT email FROM users")
        assert sorted(email for (email,) in stored) == sorted(f"row{n}@example.org" for n in range(1000))


async def test_waiting_for_a_session_ends(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """If the pooler has none in time, the call is unavailable and waits only once; the next one succeeds."""
    with pgbouncer(url, "transaction", default_pool_size=1, query_wait_timeout=1) as bouncer:
        database = Database(Settings(database_url=bouncer.url(url), database_pooler="transaction"))
        async with database.begin() as session:
            await session.execute(select(1))
            with pytest.raises(PoolExhausted):
                await Reader(database, PostRepository).get(1)
        assert len(caplog.records) == 1
        await database.ping()
        await database.close()


async def test_error_of_a_pooler_is_reported_although_a_reset_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PgBouncer closes the connection with the client's next bytes unread."""
    async with fake_postgres(reset_with("08P01", "query_wait_timeout")) as port:
        url = f"postgresql://ada@127.0.0.1:{port}/roster"
        database = Database(Settings(database_url=url, database_pooler="transaction"))
        with pytest.raises(PoolExhausted):
            await database.ping()
        await database.close()
    assert caplog.messages == ["POOL_EXHAUSTED: query_wait_timeout"]


async def doctor(folder: Path, url: str, setting: str) -> Ended:
    return await run(
        ROSTER,
        "doctor",
        folder=folder,
        ROSTER_LISTEN="127.0.0.1:0",
        ROSTER_METRICS_LISTEN="",
        ROSTER_DATABASE_URL=url,
        ROSTER_DATABASE_POOLER=setting,
    )


@pytest.mark.parametrize(
    ("mode", "setting", "mark", "advice"),
    [
        ("transaction", "none", "FAIL", "set ROSTER_DATABASE_POOLER=transaction"),
        ("transaction", "session", "FAIL", "set ROSTER_DATABASE_POOLER=transaction"),
        ("transaction", "transaction", "ok", "in transaction mode"),
        ("session", "none", "ok", "in session mode; its pool needs 25 connections"),
        ("session", "transaction", "warn", "ROSTER_DATABASE_POOLER=session saves"),
        ("direct", "transaction", "warn", "ROSTER_DATABASE_POOLER=none saves"),
    ],
)
async def test_doctor_says_what_to_set(
    mode: Any, setting: str, mark: str, advice: str, url: str, tmp_path: Path
) -> None:
    """It recognises a pooler and its mode."""
    if mode == "direct":
        ended = await doctor(tmp_path, url, setting)
    else:
        with pgbouncer(url, mode) as bouncer:
            ended = await doctor(tmp_path, bouncer.url(url), setting)
    lines = [line.split(maxsplit=2) for line in ended.out.splitlines()]
    found = next(line for line in lines if line[1] == "pooler")
    assert found[0] == mark
    assert advice in found[2]
    assert ended.status == (1 if mark == "FAIL" else 0)


async def test_doctor_recognises_a_busy_pooler(url: str, tmp_path: Path) -> None:
    """Also if it hands out its sessions in turn, while another client holds one."""
    with pgbouncer(url, "transaction", server_round_robin=1) as bouncer:
        clients = [await asyncpg.connect(plain(bouncer.url(url))) for _ in range(3)]
        for client in clients:
            await client.execute("BEGIN")
        for client in clients[:2]:
            await client.execute("COMMIT")
        ended = await doctor(tmp_path, bouncer.url(url), "none")
        assert "set ROSTER_DATABASE_POOLER=transaction" in ended.out
        for client in clients:
            await client.close()


async def test_server_refuses_an_unknown_pooler(url: str, bouncer: PgBouncer, tmp_path: Path) -> None:
    """It would leave settings in the sessions of others; it says what to set."""
    async with waiting_to_serve(
        tmp_path, ROSTER_DATABASE_URL=bouncer.url(url), ROSTER_DATABASE_POOLER="none"
    ) as server:
        ended = await server.ended()
    assert ended.status == 2
    assert "set ROSTER_DATABASE_POOLER=transaction" in ended.err


async def test_server_refuses_a_replica_behind_a_pooler(url: str, bouncer: PgBouncer, tmp_path: Path) -> None:
    """The one of several hosts that is in transaction mode, without a trace in the pool's sessions."""
    name, port = make_url(url).database, make_url(url).port
    with pgbouncer(url, "session") as sessions:
        hosts = [f"127.0.0.1:{each}" for each in (1, port, sessions.port, bouncer.port)]
        settings = {
            "ROSTER_DATABASE_URL": url,
            "ROSTER_DATABASE_POOLER": "none",
            "ROSTER_REPLICA_URL": f"postgresql://postgres@{','.join(hosts)}/{name}",
        }
        async with waiting_to_serve(tmp_path, **settings) as server:
            ended = await server.ended()
    assert ended.status == 2
    assert f"the replica {hosts[-1]} is behind a pooler in transaction mode" in ended.err
    client = await asyncpg.connect(plain(bouncer.url(url)), statement_cache_size=0)
    assert await client.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
    assert await client.fetchval("SHOW statement_timeout") == "0"
    await client.close()


async def test_server_starts_without_replicas(url: str, tmp_path: Path) -> None:
    """One refuses connections, one accepts them and never answers."""
    name = make_url(url).database
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = f"127.0.0.1:1,127.0.0.1:{silent.getsockname()[1]}"
        async with serving(
            tmp_path,
            ROSTER_DATABASE_URL=url,
            ROSTER_DATABASE_POOLER="none",
            ROSTER_REPLICA_URL=f"postgresql://postgres@{hosts}/{name}?connect_timeout=0",
        ):
            pass


async def test_migrations_refuse_transaction_mode(url: str, bouncer: PgBouncer, tmp_path: Path) -> None:
    """They name the setting for a direct connection, with which they run; session mode is good too."""
    refused = await run(ROSTER, "migrate", folder=tmp_path, ROSTER_DATABASE_URL=bouncer.url(url))
    assert (refused.status, "set ROSTER_MIGRATION_URL" in refused.err) == (2, True)
    with pgbouncer(url, "session") as sessions:
        for own in (url, sessions.url(url)):
            migrated = await run(
                ROSTER,
                "migrate",
                folder=tmp_path,
                ROSTER_DATABASE_URL=bouncer.url(url),
                ROSTER_DATABASE_POOLER="transaction",
                ROSTER_MIGRATION_URL=own,
            )
            assert (migrated.status, migrated.err) == (0, "")
