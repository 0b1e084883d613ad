"""Single reads that come together share a statement, and nothing else."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import grpc
import pytest
from sqlalchemy import make_url, select, text, update

from roster.v1 import posts_pb2, posts_pb2_grpc, resources_pb2, users_pb2, users_pb2_grpc
from service.auth.caller import Caller, set_caller
from service.db import reads as lookups
from service.db.compiled import CompiledSelect
from service.db.engine import Database
from service.db.reads import Reader
from service.db.statements import LISTENERS
from service.errors import DatabaseUnavailable, PoolExhausted, PostNotFound, RosterError, UserNotFound
from service.posts.repository import PostRepository
from service.server import Server
from service.settings import Settings
from service.users.model import User
from service.users.repository import CREDENTIALS, UserRepository, credentials_from_row
from tests.support.rows import add_posts, add_users
from tests.support.server import serve

CALLER: ContextVar[str] = ContextVar("CALLER")


@dataclass
class Gate:
    """Notes the keys of every statement, and holds back the answers to those that ask for a held key."""

    keys: list[list[Any]] = field(default_factory=list)
    held: set[Any] = field(default_factory=set)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def noted(self, keys: list[Any]) -> None:
        self.keys.append(sorted(keys))
        if self.held.intersection(keys):
            self.arrived.set()
            await self.opened.wait()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """The gate before which the answers of all statements wait."""
    gate, fetched = Gate(), CompiledSelect._fetch

    async def gated(query: CompiledSelect, driver: Any, bound: Any) -> Any:
        found = await fetched(query, driver, bound)
        keys = bound[0]
        await gate.noted(json.loads(keys) if isinstance(keys, str) else keys)
        return found

    monkeypatch.setattr(CompiledSelect, "_fetch", gated)
    return gate


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


async def errors_of(calls: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_a_user_is_found_by_id_and_by_email(database: Database, users: Reader) -> None:
    """The columns that are shown, by either key; times are microseconds."""
    (id,) = await add_users(database, full_name="Ada")
    found = [await users.get(id), await users.get("user0@example.org")]
    assert [(user.id, user.email, user.full_name, user.is_active, user.version) for user in found] == [
        (id, "user0@example.org", "Ada", True, 1)
    ] * 2
    async with database.read() as session:
        stored = await UserRepository(session).get(id)
    assert [user.created_at for user in found] == [stored.created_at] * 2


async def test_a_post_is_found_by_id(database: Database, posts: Reader) -> None:
    """With its content."""
    [author_id] = await add_users(database)
    [id] = await add_posts(database, [author_id], content="Text")
    post = await posts.get(id)
    assert (post.id, post.title, post.content, post.author_id) == (id, "Post 0", "Text", author_id)


async def test_what_is_not_there_is_told_apart(database: Database, users: Reader, posts: Reader) -> None:
    """Each caller of a statement gets its own row, or is told that there is none."""
    (id,) = await add_users(database)
    found, missing, other = await errors_of([users.get(id), users.get(4711), users.get(4712)])
    assert found.id == id
    assert isinstance(missing, UserNotFound)
    assert isinstance(other, UserNotFound)
    assert missing is not other
    with pytest.raises(PostNotFound):
        await posts.get(4711)


async def test_a_password_hash_is_read_of_those_who_may_come_in(database: Database, users: Reader) -> None:
    """An inactive user, one without a password and an unknown one are nobody."""
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


async def test_what_one_caller_is_told_is_not_told_another(
    database: Database, users: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement is asked in nobody's context; each of its callers hears of it, and of no other."""
    ids = await add_users(database, 3)
    asked_in: list[str] = []
    read = database.read

    def reading() -> Any:
        asked_in.append(CALLER.get(""))
        return read()

    monkeypatch.setattr(database, "read", reading)

    async def call(caller: str, id: int) -> int:
        heard: list[str] = []
        CALLER.set(caller)
        LISTENERS.set((lambda statement, _: heard.append(statement),))
        await users.get(id)
        return len(heard)

    assert await asyncio.gather(*(call(f"caller {id}", id) for id in ids)) == [1, 1, 1]
    assert set(asked_in) == {""}


async def test_calls_that_come_together_share_a_statement(
    database: Database, users: Reader, gate: Gate
) -> None:
    """A hundred at most; who asks for the same row is answered with it too."""
    ids = await add_users(database, 150)
    found = await asyncio.gather(*(users.get(id) for id in ids + ids[:1]))
    assert [user.id for user in found] == ids + ids[:1]
    assert gate.keys == [ids[:100], [ids[0], *ids[100:]]]


async def test_a_statement_waits_for_those_that_a_busy_loop_brings(
    database: Database, users: Reader, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "MAX_GATHER_SECONDS", 60)
    ids = await add_users(database, 5)
    calls = []
    for id in ids:
        calls.append(asyncio.create_task(users.get(id)))
        for _ in range(lookups.QUIET_TURNS // 2):
            await asyncio.sleep(0)
    assert [user.id for user in await asyncio.gather(*calls)] == ids
    assert gate.keys == [ids]


async def test_no_statement_waits_for_ever(
    database: Database, users: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though every turn of the loop brings somebody."""
    monkeypatch.setattr(lookups, "MAX_KEYS", 1_000_000)
    ids = await add_users(database, 2)
    first, others = asyncio.create_task(users.get(ids[0])), []
    while not first.done():
        others.append(asyncio.create_task(users.get(ids[1])))
        await asyncio.sleep(0)
    assert (await first).id == ids[0]
    assert {user.id for user in await asyncio.gather(*others)} == {ids[1]}


async def test_batches_are_not_parted_and_share_statements(
    database: Database, users: Reader, gate: Gate
) -> None:
    """The ids of a batch are read by one statement, other batches with them until there are a hundred."""
    ids = await add_users(database, 150)
    first, many, late = await asyncio.gather(
        users.get_many(ids[:1]), users.get_many([*ids[1:], 4711]), users.get_many(ids[1:2])
    )
    assert [user and user.id for user in (*first, *late)] == ids[:2]
    assert [user and user.id for user in many] == [*ids[1:], None]
    assert gate.keys == [sorted([*ids, 4711]), ids[1:2]]


async def test_a_single_look_up_does_not_wait_for_a_batch(
    database: Database, users: Reader, gate: Gate
) -> None:
    """They are read by statements of their own."""
    ids = await add_users(database, 2)
    gate.held = {ids[0]}
    batch = asyncio.create_task(users.get_many(ids[:1]))
    await gate.arrived.wait()
    assert (await users.get(ids[1])).id == ids[1]
    gate.opened.set()
    assert [user and user.id for user in await batch] == ids[:1]


async def test_look_ups_of_callers_who_wait_go_in_turn(database: Database, users: Reader, gate: Gate) -> None:
    """A caller with many batches holds another up for one of them, not for all."""
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


async def test_a_call_sees_what_was_committed_before_it(
    database: Database, users: Reader, gate: Gate
) -> None:
    """One that comes while a statement is under way does not get that statement's answer."""
    (id,) = await add_users(database, full_name="before")
    gate.held = {id}
    early = asyncio.create_task(users.get(id))
    await gate.arrived.wait()
    async with database.begin() as session:
        await session.execute(update(User).values(full_name="after"))
    late = asyncio.create_task(users.get(id))
    await asyncio.sleep(0)  # it has asked by now
    gate.opened.set()
    assert [(await early).full_name, (await late).full_name] == ["before", "after"]


async def test_a_caller_that_leaves_takes_no_other_with_it(
    database: Database, users: Reader, gate: Gate
) -> None:
    """Neither those of its statement, nor those who wait for the next one."""
    first, second, third = await add_users(database, 3)
    gate.held = {first}
    leaving, staying = (asyncio.create_task(users.get(id)) for id in (first, second))
    await gate.arrived.wait()
    waiting, leaving_too = asyncio.create_task(users.get(third)), asyncio.create_task(users.get(first))
    await asyncio.sleep(0)
    leaving.cancel()
    leaving_too.cancel()
    await asyncio.wait([leaving, leaving_too])
    gate.opened.set()
    assert [(await staying).id, (await waiting).id] == [second, third]
    assert gate.keys == [[first, second], [third]]


async def test_a_statement_that_nobody_waits_for_is_cancelled(
    database: Database, users: Reader, gate: Gate
) -> None:
    """So that the next one goes at once, and a stuck one is bounded by its callers' deadlines."""
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


async def test_a_statement_is_gone_from_postgresql_with_its_last_caller(postgresql_url: str) -> None:
    """The backend is told to stop: nothing runs on for somebody who has left."""
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


async def test_an_error_reaches_every_caller_as_its_own(database: Database, users: Reader) -> None:
    """And the next statement starts afresh."""
    (id,) = await add_users(database)
    assert (await users.get(id)).id == id
    await rename(database, "users", "gone")
    errors = await errors_of([users.get(number) for number in range(3)])
    assert [type(error) for error in errors] == [RuntimeError] * 3
    assert len(set(map(id_of, errors))) == 3
    await rename(database, "gone", "users")
    assert (await users.get(id)).id == id


async def test_a_database_that_is_away_is_told_to_every_caller(database_url: str) -> None:
    """As an error of its own, with the reason."""
    away = {"database": "/dev/null/roster.db"} if "sqlite" in database_url else {"port": 1}
    url = make_url(database_url).set(**away)
    database = Database(Settings(database_url=url.render_as_string(hide_password=False)))
    reader = user_reader(database)
    errors = await errors_of([reader.get(number) for number in range(3)])
    assert [type(error) for error in errors] == [DatabaseUnavailable] * 3
    assert len(set(map(id_of, errors))) == 3
    await reader.close()
    await database.close()


async def test_connections_of_before_a_restart_fail_no_call(postgresql_url: str) -> None:
    """Though the whole pool is of them: the statement is sent once more, and only reads."""
    database, other = (Database(Settings(database_url=postgresql_url)) for _ in range(2))
    users = user_reader(database)
    (id,) = await add_users(database)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await (await stack.enter_async_context(database.read())).execute(select(1))
    async with other.read() as session:
        others = (
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
        )
        await session.execute(text(f"{others} AND pid <> pg_backend_pid()"))
    assert (await users.get(id)).id == id
    await users.close()
    await database.close()
    await other.close()


async def test_an_exhausted_pool_refuses_all_within_its_timeout(database_url: str) -> None:
    """However many wait; it works once a connection is free."""
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


async def test_a_connection_goes_back_to_the_pool_now_and_then(
    database: Database, users: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many wait, other calls get it too; and all are answered."""
    monkeypatch.setattr(lookups, "MAX_KEYS", 1)
    monkeypatch.setattr(lookups, "MAX_STATEMENTS", 2)
    ids = await add_users(database, 5)
    read = MagicMock(side_effect=database.read)
    monkeypatch.setattr(database, "read", read)
    found = await asyncio.gather(*(users.get(id) for id in ids))
    assert [user.id for user in found] == ids
    assert read.call_count == 3


async def test_close_ends_what_is_under_way(database: Database, users: Reader, gate: Gate) -> None:
    """Nobody is left waiting, neither for this statement nor for the next."""
    (id,) = await add_users(database)
    gate.held = {id}
    asked = asyncio.create_task(users.get(id))
    await gate.arrived.wait()
    waiting = asyncio.create_task(users.get(id))
    await asyncio.sleep(0)
    await users.close()
    assert [type(error) for error in await errors_of([asked, waiting])] == [asyncio.CancelledError] * 2


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server for the test alone."""
    async with serve(database_url) as server:
        yield server


async def test_many_calls_of_get_user_take_few_statements(server: Server, gate: Gate) -> None:
    """64 at once: those that come while the first one's statement is under way share the second."""
    ids = await add_users(server.database, 64)
    gate.held = {ids[0]}
    async with grpc.aio.insecure_channel(server.address) as channel:
        get = users_pb2_grpc.UserServiceStub(channel).GetUser
        calls = [get(users_pb2.GetUserRequest(id=ids[0]))]
        await gate.arrived.wait()
        calls += [get(users_pb2.GetUserRequest(id=id)) for id in ids[1:]]
        while len(server.users._rows[int]._waiting) < len(calls) - 1:  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)
        gate.opened.set()
        assert [(await call).id for call in calls] == ids
    assert gate.keys == [ids[:1], ids[1:]]


async def test_a_deadline_ends_its_own_call_only(server: Server, gate: Gate) -> None:
    """Who shares a statement with one that is too late is answered."""
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
async def frozen(database_url: str) -> AsyncIterator[None]:
    """Let nobody write: SQLite's one writer is somebody else, PostgreSQL is as a replica is."""
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
    """Return every RPC that reads, called; an export is read to its first message."""
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
    """Every read is answered the same where nothing can be written, so that a replica could serve it."""
    [user] = await add_users(database)
    [post] = await add_posts(database, [user])
    answers = await answers_to_reads(database_url, user, post)
    async with frozen(database_url):
        assert await answers_to_reads(database_url, user, post) == answers
    assert [name for name, answer in answers.items() if not answer.ByteSize()] == ["VerifyPassword"]


async def answers_to_reads(database_url: str, user: int, post: int) -> dict[str, Any]:
    """Return what a new server answers to every RPC that reads."""
    async with serve(database_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        return {name: await call for name, call in reads(channel, user, post).items()}


def id_of(error: RosterError) -> int:
    return id(error)


async def test_those_who_left_are_forgotten(database_url: str) -> None:
    """Also where no connection was to be had; the list of them would grow with an outage."""
    database = Database(Settings(database_url=database_url, pool_size=1, max_overflow=0, pool_timeout=60))
    users = user_reader(database)
    async with database.read() as session:
        await session.execute(select(1))
        for _ in range(3):
            call = asyncio.create_task(users.get(1))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await asyncio.wait([task]) if (task := users._rows[int]._task) else None
        await asyncio.sleep(0)
        assert not users._rows[int]._waiting
    await users.close()
    await database.close()
