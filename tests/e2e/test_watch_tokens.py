"""The token in the first message of an export: the feed has all changes since before the first row."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import text

from roster.consistency import ANY
from roster.v1.changes_pb2 import Change, ListChangesRequest, WatchChangesRequest
from roster.v1.changes_pb2_grpc import ChangeServiceAsyncStub, ChangeServiceStub
from roster.v1.posts_pb2 import ExportPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, ExportUsersRequest, UpdateUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.server import Server
from tests.support.rows import add_posts, add_users
from tests.support.server import serve
from tests.support.standby import ReplicatedDatabase
from tests.support.statements import Fetch, Statement, intercept_fetches
from tests.support.tokens import at

MASK = FieldMask(paths=["full_name"])
DISABLE = "ALTER TABLE posts DISABLE TRIGGER log_update"


@pytest.fixture
def changes(channel: grpc.aio.Channel) -> ChangeServiceAsyncStub:
    """The client of ChangeService."""
    return ChangeServiceStub(channel)


async def export(users: UserServiceAsyncStub, *, options: Any = None, **asked: Any) -> tuple[str, list[int]]:
    """Return the token of an export, which only the first message has, and the ids of its rows."""
    messages = [
        message async for message in users.ExportUsers(ExportUsersRequest(**asked), **(options or {}))
    ]
    assert not any(message.watch_token for message in messages[1:])
    token = messages[0].watch_token if messages else ""
    return token, [user.id for message in messages for user in message.users]


async def changed_ids(changes: ChangeServiceAsyncStub, token: str) -> list[int]:
    """Return the ids of the changed users, deleted ones included."""
    listed = await changes.ListChanges(ListChangesRequest(token=token, page_size=1000))
    assert not listed.has_more
    return sorted(change.user.id or change.deleted_user_id for change in listed.changes)


async def test_first_message_has_the_token(
    server: Server, users: UserServiceAsyncStub, posts: PostServiceAsyncStub, changes: ChangeServiceAsyncStub
) -> None:
    """Of all entities; a resumed export has none."""
    ids = await add_users(server.database, 3)
    await add_posts(server.database, ids)

    token, exported = await export(users, batch_size=1)
    assert exported == ids
    messages = [message async for message in posts.ExportPosts(ExportPostsRequest(batch_size=1))]
    assert [bool(message.watch_token) for message in messages] == [True, False, False]
    assert await export(users, after_id=ids[0]) == ("", ids[1:])

    [post_id] = await add_posts(server.database, ids[:1])
    for each in (token, messages[0].watch_token):
        listed = await changes.ListChanges(ListChangesRequest(token=each))
        assert [change.post.id for change in listed.changes] == [post_id]
        watch = changes.WatchChanges(WatchChangesRequest(token=each, entities=[Change.POSTS]))
        response: Any = await watch.read()
        assert [change.post.id for change in response.changes] == [post_id]
        watch.cancel()


async def test_export_without_rows_has_only_the_token(
    server: Server, users: UserServiceAsyncStub, changes: ChangeServiceAsyncStub
) -> None:
    token, exported = await export(users, filter="is_active = false")
    assert exported == []
    ids = await add_users(server.database)
    assert await changed_ids(changes, token) == ids


async def test_changes_after_the_first_row_was_read_are_reported(
    server: Server, users: UserServiceAsyncStub, changes: ChangeServiceAsyncStub
) -> None:
    """The export has the old row, and the changes after it have the new one."""
    [id] = await add_users(server.database)
    is_first = True

    async def change_after_read(statement: Statement, fetch: Fetch) -> Any:
        nonlocal is_first
        rows = await fetch()
        if is_first and "FROM users" in statement.sql:
            is_first = False
            await users.UpdateUser(UpdateUserRequest(user=User(id=id, full_name="Ada"), update_mask=MASK))
        return rows

    with intercept_fetches(change_after_read):
        messages = [message async for message in users.ExportUsers(ExportUsersRequest())]
    assert messages[0].users[0].full_name == ""
    assert await changed_ids(changes, messages[0].watch_token) == [id]


async def test_export_works_without_a_feed(server: Server, users: UserServiceAsyncStub) -> None:
    """It has no token then."""
    ids = await add_users(server.database)
    async with server.database.begin() as session:
        drop = "DROP TRIGGER log_update_of_posts" if server.database.is_sqlite else DISABLE
        await session.execute(text(drop))
    assert await export(users) == ("", ids)


async def test_export_does_not_wait_for_the_token(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the log can't be read in time, or not at all."""
    monkeypatch.setattr("service.changes.export.TOKEN_SECONDS", 0.05)
    ids = await add_users(server.database)

    async def stall(statement: Statement, fetch: Fetch) -> Any:
        if "feed_id" in statement.sql:
            await asyncio.sleep(30)
        return await fetch()

    async def fail(statement: Statement, fetch: Fetch) -> Any:
        if "feed_id" in statement.sql:
            raise RuntimeError("a bug")
        return await fetch()

    for fault in (stall, fail):
        with intercept_fetches(fault):
            assert await export(users) == ("", ids)


@pytest.fixture
async def replicating(replicated: ReplicatedDatabase) -> AsyncIterator[tuple[Server, UserServiceAsyncStub]]:
    """A server that reads on a standby, and its client."""
    async with (
        serve(replicated.url, replica_url=replicated.replica_url) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield server, UserServiceStub(channel)


async def test_replica_gives_a_token_only_if_it_has_caught_up(
    replicating: tuple[Server, UserServiceAsyncStub], replicated: ReplicatedDatabase
) -> None:
    """The rows come from the replica all the same."""
    server, users = replicating
    ids = await add_users(server.database)
    await replicated.standby.catch_up()
    token, exported = await export(users, options=at(ANY))
    assert (bool(token), exported) == (True, ids)

    await replicated.standby.pause_replay()
    await add_users(server.database, email="late@example.org")
    assert await export(users, options=at(ANY)) == ("", ids)
    token, exported = await export(users)
    assert (bool(token), len(exported)) == (True, 2)


async def test_replica_must_have_what_the_token_stands_for(
    replicating: tuple[Server, UserServiceAsyncStub], replicated: ReplicatedDatabase
) -> None:
    """A user who is created just before the token is taken: the feed will not report it."""
    server, users = replicating
    ids = await add_users(server.database)
    await export(users)  # the first read of a feed writes its identity
    await replicated.standby.catch_up()

    async def create_before_token(statement: Statement, fetch: Fetch) -> Any:
        if "feed_id" in statement.sql:
            await replicated.standby.pause_replay()
            await users.CreateUser(CreateUserRequest(user=User(email="late@example.org")))
        return await fetch()

    with intercept_fetches(create_before_token):
        assert await export(users, options=at(ANY)) == ("", ids)


async def test_all_pages_have_what_the_token_stands_for(
    replicating: tuple[Server, UserServiceAsyncStub],
    replicated: ReplicatedDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each may come from another replica, which has not caught up: then it comes from the primary."""
    server, users = replicating
    ids = await add_users(server.database, 3)
    await replicated.standby.catch_up()
    requirements = []
    read = server.database.rows

    async def note(*query: Any, requirement: Any, **values: Any) -> Any:
        requirements.append(requirement.position.lsn)
        return await read(*query, requirement=requirement, **values)

    monkeypatch.setattr(server.database, "rows", note)
    token, exported = await export(users, options=at(ANY), batch_size=1)
    assert (bool(token), exported) == (True, ids)
    assert len(requirements) == 3
    assert min(requirements) > 0
