"""Exports: every row once, in id order, in messages that are never too large."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from sqlalchemy import func, select, text

from roster.v1.posts_pb2 import ExportPostsRequest, ExportPostsResponse, ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub, PostServiceStub
from roster.v1.users_pb2 import ExportUsersRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.rows import add_posts, add_users
from tests.support.server import serve
from tests.support.statements import Statement, record_statements

MIB = 1 << 20
MAX_ANSWER_BYTES = 3 * MIB
# A statement that is still under way is in a transaction as well, but not idle.
IN_TRANSACTION = text(
    "datname = current_database() AND state LIKE 'idle in transaction%' AND query LIKE '%FROM posts%'"
)


@pytest.fixture
async def narrow(server: Server) -> AsyncIterator[PostServiceAsyncStub]:
    """The client of a second server on the same database, with one connection for calls."""
    async with (
        serve(server.settings.database_url, pool_size=1, max_overflow=0) as narrow,
        grpc.aio.insecure_channel(narrow.address) as channel,
    ):
        yield PostServiceStub(channel)


async def exported_posts(
    posts: PostServiceAsyncStub, request: ExportPostsRequest
) -> list[ExportPostsResponse]:
    return [message async for message in posts.ExportPosts(request)]


async def test_exports_every_user_once_in_id_order(server: Server, users: UserServiceAsyncStub) -> None:
    """Each message has the requested number of rows, and the `last_id` to resume after."""
    ids = await add_users(server.database, 1001)

    async def sent(**asked: Any) -> list[list[int]]:
        messages = [message async for message in users.ExportUsers(ExportUsersRequest(**asked))]
        assert [message.last_id for message in messages] == [message.users[-1].id for message in messages]
        return [[user.id for user in message.users] for message in messages]

    assert await sent() == [ids[:1000], ids[1000:]]
    assert await sent(batch_size=400) == [ids[:400], ids[400:800], ids[800:]]
    assert await sent(after_id=ids[899], batch_size=100) == [ids[900:1000], ids[1000:]]
    assert await sent(after_id=ids[899], filter=f"id < {ids[901]}") == [[ids[900]]]
    assert await sent(after_id=ids[-1]) == []


async def test_exported_user_equals_listed_user(server: Server, users: UserServiceAsyncStub) -> None:
    """It has every field but the posts."""
    await add_users(server.database, 3, full_name="Ada")
    (message,) = [message async for message in users.ExportUsers(ExportUsersRequest())]

    assert list(message.users) == list((await users.ListUsers(ListUsersRequest())).users)


async def test_exports_every_post_once_in_id_order(server: Server, posts: PostServiceAsyncStub) -> None:
    """No message is larger than 3 MiB, so large posts come a few at a time."""
    author_ids = await add_users(server.database)
    ids = await add_posts(server.database, author_ids * 5, content="é" * (MIB // 2))
    ids += await add_posts(server.database, author_ids * 5)

    messages = await exported_posts(posts, ExportPostsRequest())
    assert [len(message.posts) for message in messages] == [2, 2, 6]
    assert all(message.ByteSize() <= MAX_ANSWER_BYTES for message in messages)
    assert [post.id for message in messages for post in message.posts] == ids
    assert [message.last_id for message in messages] == [ids[1], ids[3], ids[9]]

    resumed = await exported_posts(posts, ExportPostsRequest(after_id=messages[0].last_id))
    assert resumed == messages[1:]
    filtered = await exported_posts(posts, ExportPostsRequest(filter='title = "Post 4"', batch_size=1))
    assert [[post.id for post in message.posts] for message in filtered] == [[ids[4]], [ids[9]]]


async def test_export_holds_no_connection_while_its_client_is_slow(
    server: Server, narrow: PostServiceAsyncStub
) -> None:
    """On a server with one connection other calls are answered, and the export continues."""
    ids = await add_posts(server.database, await add_users(server.database) * 20, content="x" * MIB)

    export = aiter(narrow.ExportPosts(ExportPostsRequest()))
    first = await anext(export)
    for _ in range(10):  # the export has filled its client's window, and waits
        assert (await narrow.ListPosts(ListPostsRequest(page_size=1))).posts
    rest = [message async for message in export]
    assert [post.id for message in [first, *rest] for post in message.posts] == ids


@pytest.fixture
def statements() -> Iterator[list[Statement]]:
    """The statements sent to the database."""
    with record_statements() as statements:
        yield statements


async def posts_in_transactions(server: Server) -> int:
    """Return how many connections hold a transaction in which posts were read."""
    async with server.database.read() as session:
        count = select(func.count()).select_from(text("pg_stat_activity")).where(IN_TRANSACTION)
        return int(await session.scalar(count) or 0)


async def test_export_reads_only_a_window_ahead_of_its_client(
    server: Server, users: UserServiceAsyncStub, posts: PostServiceAsyncStub, statements: list[Statement]
) -> None:
    """It holds no transaction either while its client does not read."""
    [author_id] = await add_users(server.database)
    ids = await add_posts(server.database, [author_id] * 40, content="x" * MIB)

    export = aiter(posts.ExportPosts(ExportPostsRequest()))
    first = await anext(export)
    quiet = read = 0
    while quiet < 10:  # calls that were answered since the export last read
        await users.ListUsers(ListUsersRequest())
        reads = [statement for statement in statements if "FROM posts" in statement.sql]
        quiet = quiet + 1 if len(reads) == read else 0
        read = len(reads)
    assert 1 <= read <= 12  # of 20
    if not server.database.is_sqlite:
        assert await posts_in_transactions(server) == 0

    rest = [message async for message in export]
    assert len(rest) == 19
    assert [post.id for message in [first, *rest] for post in message.posts] == ids


async def test_cancelled_export_does_not_disturb_others(server: Server, users: UserServiceAsyncStub) -> None:
    """The server answers the next call."""
    await add_users(server.database, 1000)
    call = users.ExportUsers(ExportUsersRequest(batch_size=1))
    await call.read()
    call.cancel()

    assert len((await users.ListUsers(ListUsersRequest())).users) == 50
