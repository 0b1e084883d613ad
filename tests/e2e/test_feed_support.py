"""Engines and roles that can't serve the change feed: it says why, and everything else works."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from uuid import uuid4

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import make_url

from roster.v1.changes_pb2 import ListChangesRequest, WatchChangesRequest
from roster.v1.changes_pb2_grpc import ChangeServiceStub
from roster.v1.posts_pb2 import BulkCreatePostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import migrations
from tests.support.altering_proxy import altering_proxy
from tests.support.errors import Refusal, refusal
from tests.support.postgres import Postgres
from tests.support.server import serve

UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
MASK = FieldMask(paths=["full_name"])
# By kind of engine: how a proxy alters what is sent to PostgreSQL, and what the feed says.
ENGINES: Mapping[str, tuple[Mapping[bytes, bytes], str]] = {
    "without xid8": ({b"xid8": b"xid9"}, "the database has no xid8 and pg_current_snapshot()"),
    "without transition tables": (
        {b"REFERENCING": b"REFERENCINK"},
        "the triggers that log changes are missing",
    ),
    "Citus": ({b"extname = 'citus'": b"extname > 'citus'"}, "on Citus there can be none"),
    "without its cluster": (
        {b"pg_control_system": b"pg_control_zystem"},
        "the database has no pg_control_system()",
    ),
    "without positions": (
        {b"pg_walfile_name(": b"pg_walfile_namo("},
        "the database has no pg_walfile_name() and pg_current_wal_insert_lsn()",
    ),
}


async def refusals(channel: grpc.aio.Channel) -> list[Refusal]:
    """Return how both RPCs of the feed refuse."""
    changes = ChangeServiceStub(channel)
    return [
        await refusal(changes.ListChanges(ListChangesRequest())),
        await refusal(changes.WatchChanges(WatchChangesRequest()).read()),
    ]


async def assert_works_without_feed(url: str, sentence: str) -> None:
    """Check both RPCs, and everything else, on a server with this database."""
    async with serve(url) as server, grpc.aio.insecure_channel(server.address) as channel:
        users, posts = UserServiceStub(channel), PostServiceStub(channel)
        for refused in await refusals(channel):
            assert (refused.code, refused.reason) == (UNIMPLEMENTED, "UNSUPPORTED")
            assert refused.message.startswith("the change feed is not available, because ")
            assert sentence in refused.message

        ada = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
        alan = await users.CreateUser(CreateUserRequest(user=User(email="alan@example.org")))
        named = User(id=ada.id, full_name="Ada")
        await users.UpdateUser(UpdateUserRequest(user=named, update_mask=MASK))
        post = Post(author_id=ada.id, title="Notes")
        load = posts.BulkCreatePosts(iter([BulkCreatePostsRequest(posts=[post], finish=True)]))
        assert [message async for message in load][-1].summary.created == 1
        await users.DeleteUser(DeleteUserRequest(id=alan.id))
        [exported] = [message async for message in users.ExportUsers(ExportUsersRequest())]
        assert (exported.watch_token, [user.id for user in exported.users]) == ("", [ada.id])
        assert len((await users.ListUsers(ListUsersRequest())).users) == 1
        assert not any(chore.done() for chore in server._chores)


@pytest.mark.parametrize("engine", ENGINES)
async def test_engine_without_a_feed_says_what_it_lacks(engine: str, empty_postgresql_url: str) -> None:
    """It is migrated without an error, twice; the triggers of one that can't have all are dropped."""
    changes, sentence = ENGINES[engine]
    async with altering_proxy(empty_postgresql_url, changes) as url:
        for _ in range(2):
            await asyncio.to_thread(migrations.upgrade, url)
        await assert_works_without_feed(url, sentence)
        await asyncio.to_thread(migrations.downgrade, url, "0006")


RIGHTS = {
    "EXECUTE ON FUNCTION pg_control_system()": "pg_control_system()",
    "SELECT ON changes": "the tables changes and feed",
    "UPDATE ON feed": "UPDATE of the table feed",
    "DELETE ON changes": "DELETE from the table changes",
}


async def test_role_without_a_right_says_which(empty_postgresql_url: str, role: str) -> None:
    """A write is logged all the same: it needs no right to the log."""
    await asyncio.to_thread(migrations.upgrade, empty_postgresql_url)
    connection = await asyncpg.connect(empty_postgresql_url.replace("+asyncpg", ""))
    await connection.execute(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};"
        f"GRANT USAGE, UPDATE ON ALL SEQUENCES IN SCHEMA public TO {role};"
    )
    as_role = make_url(empty_postgresql_url).set(username=role).render_as_string()
    for right, name in RIGHTS.items():
        await connection.execute(f"REVOKE {right} FROM {role}, PUBLIC")
        await assert_works_without_feed(as_role, f"the role of the service may not use {name}; grant it that")
        await connection.execute(f"GRANT {right} TO {role}; TRUNCATE users CASCADE")
    assert await connection.fetchval("SELECT count(*) FROM changes") == 5 * len(RIGHTS)
    await connection.execute(f"DROP OWNED BY {role}")
    await connection.close()


@pytest.fixture
async def role(postgres: Postgres) -> AsyncIterator[str]:
    """A role that may log in."""
    name = f"service{uuid4().hex}"
    await postgres.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    await postgres.execute(f"DROP ROLE {name}")
