"""Concurrent reads of single rows share statements, but nothing else."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import grpc
import pytest
from sqlalchemy import event, make_url, select, text, update

from roster.errors import DatabaseUnavailable, PoolExhausted, PostNotFound, RosterError, UserNotFound
from roster.v1 import posts_pb2, posts_pb2_grpc, resources_pb2, users_pb2, users_pb2_grpc
from service.auth.caller import Caller, set_caller
from service.db import driver, reads as lookups
from service.db.engine import Database
from service.db.paging import ListQuery
from service.db.reads import Reader
from service.db.statements import LISTENERS
from service.posts.repository import PostRepository
from service.server import Server
from service.settings import Settings
from service.users.model import User
from service.users.repository import CREDENTIALS, UserRepository, credentials_from_row
from tests.support.rows import add_posts, add_users
from tests.support.server import serve
from tests.support.statements import Fetch, Statement, intercept_fetches

CALLER: ContextVar[str] = ContextVar("CALLER")


@dataclass
class Gate:
    """Notes the keys of every look-up, and holds the rows of those that ask for a held key."""

    keys: list[list[Any]] = field(default_factory=list)
    held: set[Any] = field(default_factory=set)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def note(self, keys: list[Any]) -> None:
        """Note the keys of a statement, and wait if one of them is held."""
        self.keys.append(sorted(keys))
        if self.held.intersection(keys):
            self.arrived.set()
            await self.opened.wait()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """The gate that the rows of every look-up have to pass."""
    gate = Gate()

    async def pass_gate(statement: Statement, fetch: Fetch) -> Any:
        rows = await fetch()
        keys = statement.parameters[0]
        await gate.note(json.loads(keys) if isinstance(keys, str) else keys)
        return rows

    with intercept_fetches(pass_gate):
        yield gate


def user_reader(database: Database) -> Reader:
    return Reader(database, UserRepository, by=(User.id, User.email))


@pytest.fixture
async def users(database: Database) -> AsyncIterator[Reader]:
    """The reader of users."""
    reader = user_reader(database)
    yield reader
    await reader.close()


@pytest.fixture
async def posts(database: Database) -> AsyncIterator[Reader]:
    """The reader of posts."""
    reader = Reader(database, PostRepository)
    yield reader
    await reader.close()


async def rename(database: Database, old: str, new: str) -> None:
    async with database.begin() as session:
        await session.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))


async def during_a_lookup(
    users: Reader, gate: Gate, id: int, *later: Coroutine[Any, Any, Any]
) -> list[asyncio.Task[Any]]:
    """Return lookups that share a statement: they began while another one was in flight, which has ended."""
    gate.held = {id}
    single = asyncio.create_task(users.get(id))
    await gate.arrived.wait()
    tasks = [asyncio.create_task(lookup) for lookup in later]
    await asyncio.sleep(0)
    gate.opened.set()
    await single
    gate.held = set()
    gate.arrived.clear()
    gate.opened.clear()
    gate.keys.clear()
    return tasks


async def errors_of(calls: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_finds_user_by_id_and_by_email(database: Database, users: Reader) -> None:
    """With its public columns; times are microseconds."""
    (id,) = await add_users(database, full_name="Ada")
    found = [await users.get(id), await users.get("user0@example.org")]
    assert [(user.id, user.email, user.full_name, user.is_active, user.version) for user in found] == [
        (id, "user0@example.org", "Ada", True, 1)
    ] * 2
    async with database.read() as session:
        stored = await UserRepository(session).get(id)
    assert [user.created_at for user in found] == [stored.created_at] * 2


async def test_finds_post_by_id(database: Database, posts: Reader) -> None:
    """With its content."""
    [author_id] = await add_users(database)
    [id] = await add_posts(database, [author_id], content="Text")
    post = await posts.get(id)
    assert (post.id, post.title, post.content, post.author_id) == (id, "Post 0", "Text", author_id)


async def test_missing_rows_are_reported_to_their_callers(
    database: Database, users: Reader, posts: Reader
) -> None:
    """Each caller of a statement gets its own row, or an error if there is none."""
    (id,) = await add_users(database)
    found, missing, other = await errors_of([users.get(id), users.get(4711), users.get(4712)])
    assert found.id == id
    assert isinstance(missing, UserNotFound)
    assert isinstance(other, UserNotFound)
    assert missing is not other
    with pytest.raises(PostNotFound):
        await posts.get(4711)


async def test_reads_hashes_of_active_users_only(database: Database, users: Reader) -> None:
    """Inactive users, users without a password and unknown users look the same."""
    async with database.begin() as session:
        repository = UserRepository(session)
        ada = await repository.create({"email": "ada@example.org", "hashed_password": "$argon2id$"})
        away = await repository.create(
            {"email": "away@example.org", "hashed_password": "x", "is_active": False}
        )
        alan = await repository.create({"email": "alan@example.org"})

    async def credentials(key: int | str) -> tuple[int, str]:
        return credentials_from_row(await users.find_columns(key, CREDENTIALS))

    assert await credentials("ada@example.org") == (ada.id, "$argon2id$")
    for nobody in (away.id, alan.id, 4711):
        assert await credentials(nobody) == (0, "")


async def test_statements_are_reported_to_their_callers_only(
    database: Database, users: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared statement runs in no call's context; each of its callers hears of it."""
    ids = await add_users(database, 3)
    asked_in: list[str] = []
    rows = database.rows

    def reading(query: Any, **values: Any) -> Any:
        asked_in.append(CALLER.get(""))
        return rows(query, **values)

    monkeypatch.setattr(database, "rows", reading)

    async def call(caller: str, id: int) -> int:
        heard: list[str] = []
        CALLER.set(caller)
        LISTENERS.set((lambda statement, _: heard.append(statement),))
        await users.get(id)
        return len(heard)

    assert await asyncio.gather(*(call(f"caller {id}", id) for id in ids)) == [1, 1, 1]
    assert asked_in == [f"caller {ids[0]}", ""]


async def test_concurrent_lookups_share_a_statement(database: Database, users: Reader, gate: Gate) -> None:
    """Except the first, which is alone. At most a hundred keys; equal keys are read once."""
    ids = await add_users(database, 150)
    found = await asyncio.gather(*(users.get(id) for id in ids + ids[:1]))
    assert [user.id for user in found] == ids + ids[:1]
    assert gate.keys == [ids[:1], ids[1:101], [ids[0], *ids[101:]]]


async def test_statement_waits_for_lookups_of_a_busy_loop(
    database: Database, users: Reader, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "MAX_GATHER_SECONDS", 60)
    ids = await add_users(database, 6)
    calls = await during_a_lookup(users, gate, ids.pop(), *(users.get(id) for id in ids[:2]))
    for id in ids[2:]:
        calls.append(asyncio.create_task(users.get(id)))
        for _ in range(lookups.QUIET_TURNS // 2):
            await asyncio.sleep(0)
    assert [user.id for user in await asyncio.gather(*calls)] == ids
    assert gate.keys == [ids]


async def test_lookup_without_others_does_not_wait(
    database: Database, users: Reader, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would share its statement."""
    waited = MagicMock(side_effect=AssertionError("a lookup waited for others"))
    monkeypatch.setattr(lookups.LookupBatcher, "_gather", waited)
    ids = await add_users(database, 3)
    assert [(await users.get(id)).id for id in ids] == ids
    assert gate.keys == [[id] for id in ids]


async def test_connection_is_kept_for_the_next_statement(
    database: Database, users: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "KEEP_SECONDS", 60)
    taken: list[Any] = []
    event.listen(
        database._engines.reader.sync_engine, "checkout", lambda *connection: taken.append(connection)
    )
    ids = await add_users(database, 3)
    taken.clear()
    for id in ids:
        await users.get(id)
        await users.page(ListQuery([], UserRepository.by_id(), None, 10))
    assert len(taken) == 1


async def test_kept_connection_is_given_back(database: Database, users: Reader) -> None:
    """Soon after its last statement; the next statement takes one again."""
    [id] = await add_users(database)
    for _ in range(2):
        assert (await users.get(id)).id == id
        async with asyncio.timeout(5):
            while database._engines.reader.pool.checkedout():  # type: ignore[attr-defined]  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_kept_connection_delays_no_call(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given back when the pool has no other, and is not kept if it is the last one."""
    monkeypatch.setattr(driver, "KEEP_SECONDS", 60)
    database = Database(Settings(database_url=database_url, pool_size=2, max_overflow=0, pool_timeout=60))
    users = user_reader(database)
    pool: Any = database._engines.reader.pool
    [id] = await add_users(database)
    assert (await users.get(id)).id == id
    async with asyncio.timeout(20), database.read() as session:
        await session.scalar(select(1))
        async with database.read() as other:
            assert await other.scalar(select(1)) == 1
    async with asyncio.timeout(20), database.read() as session:
        await session.scalar(select(1))
        assert (await users.get(id)).id == id
        assert pool.checkedout() == 1
    await users.close()
    await database.close()


async def test_lookups_after_a_shared_statement_share_the_next(
    database: Database, users: Reader, gate: Gate
) -> None:
    """None of them goes alone, which would split the others."""
    ids = await add_users(database, 3)
    await asyncio.gather(*await during_a_lookup(users, gate, ids[0], *(users.get(id) for id in ids[1:])))
    gate.keys.clear()
    await asyncio.gather(*(users.get(id) for id in ids))
    assert gate.keys == [ids]


async def test_lookup_needs_no_share_of_its_caller(database_url: str) -> None:
    """Others may wait for its end, and must not wait for the caller's other calls."""
    database = Database(Settings(database_url=database_url, pool_size=4, max_overflow=0, pool_timeout=60))
    users = user_reader(database)
    [id] = await add_users(database)
    set_caller(Caller("greedy"))
    async with asyncio.timeout(20), database.read() as session:  # all that one caller may hold
        await session.scalar(select(1))
        assert (await users.get(id)).id == id
    await users.close()
    await database.close()


async def test_statement_waits_a_limited_time(
    database: Database, users: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if every iteration of the loop brings another lookup."""
    monkeypatch.setattr(lookups, "MAX_KEYS", 1_000_000)
    ids = await add_users(database, 2)
    first, others = asyncio.create_task(users.get(ids[0])), []
    while not first.done():
        others.append(asyncio.create_task(users.get(ids[1])))
        await asyncio.sleep(0)
    assert (await first).id == ids[0]
    assert {user.id for user in await asyncio.gather(*others)} == {ids[1]}


async def test_batches_are_not_split_and_share_statements(
    database: Database, users: Reader, gate: Gate
) -> None:
    """Further batches join until a statement has a hundred keys."""
    ids = await add_users(database, 150)
    _, first, many, late = await asyncio.gather(
        users.get_many([1000]),
        users.get_many(ids[:1]),
        users.get_many([*ids[1:], 4711]),
        users.get_many(ids[1:2]),
    )
    assert [user and user.id for user in (*first, *late)] == ids[:2]
    assert [user and user.id for user in many] == [*ids[1:], None]
    assert gate.keys == [[1000], sorted([*ids, 4711]), ids[1:2]]


async def test_single_lookup_does_not_wait_for_a_batch(database: Database, users: Reader, gate: Gate) -> None:
    """They have separate statements."""
    ids = await add_users(database, 2)
    gate.held = {ids[0]}
    batch = asyncio.create_task(users.get_many(ids[:1]))
    await gate.arrived.wait()
    assert (await users.get(ids[1])).id == ids[1]
    gate.opened.set()
    assert [user and user.id for user in await batch] == ids[:1]


async def test_waiting_callers_take_turns(database: Database, users: Reader, gate: Gate) -> None:
    """A caller with many batches delays another by one of them, not by all."""
    ids = await add_users(database, 102)
    gate.held = {ids[0]}

    async def look_up(caller: str, keys: list[int]) -> None:
        set_caller(Caller(caller))
        await users.get_many(keys)

    calls = [asyncio.create_task(look_up("greedy", ids[:100])) for _ in range(5)]
    await gate.arrived.wait()
    calls += [asyncio.create_task(look_up("modest", ids[100:])) for _ in range(2)]
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(*calls)
    assert [len(keys) for keys in gate.keys] == [100, 100, 102, 102, 100]


async def test_lookup_sees_earlier_commits(database: Database, users: Reader, gate: Gate) -> None:
    """A lookup that comes during a statement does not get that statement's rows."""
    (id,) = await add_users(database, full_name="before")
    gate.held = {id}
    early = asyncio.create_task(users.get(id))
    await gate.arrived.wait()
    async with database.begin() as session:
        await session.execute(update(User).values(full_name="after"))
    late = asyncio.create_task(users.get(id))
    await asyncio.sleep(0)  # it has sent its statement
    gate.opened.set()
    assert [(await early).full_name, (await late).full_name] == ["before", "after"]


async def test_cancelled_lookup_does_not_affect_others(database: Database, users: Reader, gate: Gate) -> None:
    """Neither those of its statement nor those that wait for the next one."""
    first, second, third, single = await add_users(database, 4)
    leaving, staying = await during_a_lookup(users, gate, single, users.get(first), users.get(second))
    gate.held = {first}
    await gate.arrived.wait()
    waiting, leaving_too = asyncio.create_task(users.get(third)), asyncio.create_task(users.get(first))
    await asyncio.sleep(0)
    leaving.cancel()
    leaving_too.cancel()
    await asyncio.wait([leaving, leaving_too])
    gate.opened.set()
    assert [(await staying).id, (await waiting).id] == [second, third]
    assert gate.keys == [[first, second], [third]]


async def test_abandoned_statement_is_cancelled(database: Database, users: Reader, gate: Gate) -> None:
    """The next one starts immediately, so that deadlines bound a stuck statement."""
    first, second = await add_users(database, 2)
    gate.held = {first}
    stuck = asyncio.create_task(users.get(first))
    await gate.arrived.wait()
    waiting = asyncio.create_task(users.get(second))
    await asyncio.sleep(0)
    stuck.cancel()
    async with asyncio.timeout(5):
        assert (await waiting).id == second
    with pytest.raises(asyncio.CancelledError):
        await stuck


async def test_abandoned_statement_ends_in_postgresql(postgresql_url: str) -> None:
    """Its backend gets a cancel request."""
    database = Database(Settings(database_url=postgresql_url))
    users = user_reader(database)
    waiting = text("SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted")
    async with database.begin() as session:
        await session.execute(text("LOCK TABLE users"))
        stuck = asyncio.create_task(users.get(1))
        while not await session.scalar(waiting):
            pass
        stuck.cancel()
        async with asyncio.timeout(5):
            while await session.scalar(waiting):
                pass
    with pytest.raises(UserNotFound):
        await users.get(1)
    await users.close()
    await database.close()


async def test_every_caller_gets_its_own_error(database: Database, users: Reader) -> None:
    """The next statement is not affected."""
    (id,) = await add_users(database)
    assert (await users.get(id)).id == id
    await rename(database, "users", "gone")
    single, *errors = await errors_of([users.get(number) for number in range(4)])
    assert isinstance(single, Exception)
    assert [type(error) for error in errors] == [RuntimeError] * 3
    assert len(set(map(id_of, errors))) == 3
    await rename(database, "gone", "users")
    assert (await users.get(id)).id == id


async def test_missing_database_is_reported_to_every_caller(database_url: str) -> None:
    """Each gets its own error, with the reason."""
    away = {"database": "/dev/null/roster.db"} if "sqlite" in database_url else {"port": 1}
    url = make_url(database_url).set(**away)
    database = Database(Settings(database_url=url.render_as_string(hide_password=False)))
    reader = user_reader(database)
    errors = await errors_of([reader.get(number) for number in range(3)])
    assert [type(error) for error in errors] == [DatabaseUnavailable] * 3
    assert len(set(map(id_of, errors))) == 3
    await reader.close()
    await database.close()


async def test_stale_connections_fail_no_call(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of PostgreSQL the statement, a read, is sent again, whether it was kept or not."""
    database, other = (Database(Settings(database_url=postgresql_url)) for _ in range(2))
    users = user_reader(database)
    (id,) = await add_users(database)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await (await stack.enter_async_context(database.read())).execute(select(1))
    monkeypatch.setattr(driver, "KEEP_SECONDS", 60)
    query = ListQuery([], UserRepository.by_id(), None, 10)
    await asyncio.gather(*(users.page(query) for _ in range(4)))
    async with other.read() as session:
        others = (
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
        )
        await session.execute(text(f"{others} AND pid <> pg_backend_pid()"))
    assert (await users.get(id)).id == id
    await users.close()
    await database.close()
    await other.close()


async def test_exhausted_pool_refuses_all_within_its_timeout(database_url: str) -> None:
    """However many wait; lookups succeed once a connection is free."""
    database = Database(Settings(database_url=database_url, pool_size=1, max_overflow=0, pool_timeout=0.1))
    (id,) = await add_users(database)
    users = user_reader(database)
    async with database.read() as session:
        await session.connection()
        async with asyncio.timeout(5):
            errors = await errors_of([users.get(id) for _ in range(250)])
    assert [type(error) for error in errors] == [PoolExhausted] * 250
    assert (await users.get(id)).id == id
    await users.close()
    await database.close()


async def test_lookups_that_wait_for_a_failed_one_fail_with_it(database_url: str) -> None:
    """They do not wait for a connection once more."""
    database = Database(Settings(database_url=database_url, pool_size=1, max_overflow=0, pool_timeout=2))
    users = user_reader(database)
    (id,) = await add_users(database)
    async with database.read() as session:
        await session.connection()
        async with asyncio.timeout(3.8):
            errors = await errors_of([users.get(id) for _ in range(3)])
    assert [type(error) for error in errors] == [PoolExhausted] * 3
    await users.close()
    await database.close()


async def test_close_cancels_shared_lookups(database: Database, users: Reader, gate: Gate) -> None:
    """Those of the current statement, and those that wait."""
    id, single = await add_users(database, 2)
    [asked] = await during_a_lookup(users, gate, single, users.get(id))
    gate.held = {id}
    await gate.arrived.wait()
    waiting = asyncio.create_task(users.get(id))
    await asyncio.sleep(0)
    await users.close()
    assert [type(error) for error in await errors_of([asked, waiting])] == [asyncio.CancelledError] * 2


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server of the test."""
    async with serve(database_url) as server:
        yield server


async def test_64_calls_of_get_user_take_two_statements(server: Server, gate: Gate) -> None:
    """Those that come during the first statement share the second."""
    ids = await add_users(server.database, 64)
    gate.held = {ids[0]}
    async with grpc.aio.insecure_channel(server.address) as channel:
        get = users_pb2_grpc.UserServiceStub(channel).GetUser
        calls = [get(users_pb2.GetUserRequest(id=ids[0]))]
        await gate.arrived.wait()
        calls += [get(users_pb2.GetUserRequest(id=id)) for id in ids[1:]]
        while len(server.users._rows[int]._on_primary._waiting) < len(calls) - 1:  # noqa: ASYNC110  (there is no event)
            await asyncio.sleep(0)
        gate.opened.set()
        assert [(await call).id for call in calls] == ids
    assert gate.keys == [ids[:1], ids[1:]]


async def test_deadline_ends_its_own_call_only(server: Server, gate: Gate) -> None:
    """Other callers of the same statement are answered."""
    first, second = await add_users(server.database, 2)
    gate.held = {first}
    async with grpc.aio.insecure_channel(server.address) as channel:
        get = users_pb2_grpc.UserServiceStub(channel).GetUser
        held = get(users_pb2.GetUserRequest(id=first), timeout=60)
        await gate.arrived.wait()
        late = get(users_pb2.GetUserRequest(id=second), timeout=0.2)
        patient = get(users_pb2.GetUserRequest(id=second))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await late
        gate.opened.set()
        assert [(await held).id, (await patient).id] == [first, second]
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@asynccontextmanager
async def block_writes(database_url: str) -> AsyncIterator[None]:
    """Let nobody write: SQLite is locked, PostgreSQL is read-only."""
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(str(make_url(database_url).database))) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
        return
    database = Database(Settings(database_url=database_url))
    async with database.begin() as session:
        name = make_url(database_url).database
        await session.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    await database.close()
    yield


def reads(channel: grpc.aio.Channel, user: int, post: int) -> dict[str, Awaitable[Any]]:
    """Call every RPC that reads; an export is read to its first message."""
    users, posts = users_pb2_grpc.UserServiceStub(channel), posts_pb2_grpc.PostServiceStub(channel)
    with_posts, with_author = resources_pb2.User.WITH_POSTS, resources_pb2.Post.WITH_AUTHOR
    return {
        "GetUser": users.GetUser(users_pb2.GetUserRequest(id=user)),
        "GetUser WITH_POSTS": users.GetUser(users_pb2.GetUserRequest(id=user, view=with_posts)),
        "BatchGetUsers": users.BatchGetUsers(users_pb2.BatchGetUsersRequest(ids=[user])),
        "ListUsers": users.ListUsers(users_pb2.ListUsersRequest()),
        "ExportUsers": users.ExportUsers(users_pb2.ExportUsersRequest()).read(),
        "VerifyPassword": users.VerifyPassword(users_pb2.VerifyPasswordRequest(id=user, password="x")),
        "GetPost": posts.GetPost(posts_pb2.GetPostRequest(id=post)),
        "GetPost WITH_AUTHOR": posts.GetPost(posts_pb2.GetPostRequest(id=post, view=with_author)),
        "BatchGetPosts": posts.BatchGetPosts(posts_pb2.BatchGetPostsRequest(ids=[post])),
        "ListPosts": posts.ListPosts(posts_pb2.ListPostsRequest()),
        "ExportPosts": posts.ExportPosts(posts_pb2.ExportPostsRequest()).read(),
    }


async def test_reads_need_no_writer(database: Database, database_url: str) -> None:
    """Without write access every read has the same response, so that a replica could serve it."""
    [user] = await add_users(database)
    [post] = await add_posts(database, [user])
    answers = await responses_to_reads(database_url, user, post)
    async with block_writes(database_url):
        assert await responses_to_reads(database_url, user, post) == answers
    assert [name for name, answer in answers.items() if not answer.ByteSize()] == ["VerifyPassword"]


async def responses_to_reads(database_url: str, user: int, post: int) -> dict[str, Any]:
    """Return the response of a new server to every RPC that reads, without the tokens, which all differ."""
    async with serve(database_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        responses: dict[str, Any] = {name: await call for name, call in reads(channel, user, post).items()}
    for name in ("ExportUsers", "ExportPosts"):
        responses[name].ClearField("watch_token")
    return responses


def id_of(error: RosterError) -> int:
    return id(error)


async def test_cancelled_lookups_are_removed(database_url: str) -> None:
    """Even if there is no connection; otherwise the queue would grow during an outage."""
    database = Database(Settings(database_url=database_url, pool_size=1, max_overflow=0, pool_timeout=60))
    users = user_reader(database)
    async with database.read() as session:
        await session.execute(select(1))
        for _ in range(3):
            call = asyncio.create_task(users.get(1))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await asyncio.wait([task]) if (task := users._rows[int]._on_primary._task) else None
        await asyncio.sleep(0)
        assert not users._rows[int]._on_primary._waiting
    await users.close()
    await database.close()
