"""Times with and without fractions of a second: how they are stored, filtered and listed."""

import operator
import re
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, example, given, settings, strategies as st
from sqlalchemy import Text, cast, delete, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest, ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub, PostServiceStub
from roster.v1.resources_pb2 import Post as PostMessage, User as UserMessage
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkUpdateUsersRequest,
    CreateUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db.base import Base, UtcDateTime
from service.db.engine import Database
from service.users.model import User
from tests.support.load_stream import load_once
from tests.support.migrations import downgrade, execute, upgrade
from tests.support.server import serve

TEN = datetime(2023, 5, 5, 10, tzinfo=UTC)
FORM = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}")
COMPARE: dict[str, Callable[[datetime, datetime], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# Few times, whole seconds and fractions around them, so that there are ties.
times = st.sampled_from([-1_000_000, -1, 0, 1, 1_000, 823_000, 999_999, 1_000_000]).map(
    lambda microseconds: TEN + timedelta(microseconds=microseconds)
)
# The users, and whether each is restored by a bulk stream.
rows = st.lists(st.tuples(times, st.booleans()), min_size=1, max_size=8)


@pytest.fixture
async def channel(database_url: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server on the database."""
    async with serve(database_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def users(channel: grpc.aio.Channel) -> UserServiceAsyncStub:
    """The client of UserService."""
    return UserServiceStub(channel)


@pytest.fixture
def posts(channel: grpc.aio.Channel) -> PostServiceAsyncStub:
    """The client of PostService."""
    return PostServiceStub(channel)


def timestamp(time: datetime) -> Timestamp:
    """Return a time as a message."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


async def fill(
    database: Database, users: UserServiceAsyncStub, created: Sequence[tuple[datetime, bool]]
) -> None:
    """Store a user for each time, one by one or restored; the id is the position, from 1."""
    single: list[dict[str, Any]] = []
    restored: list[dict[str, Any]] = []
    for id, (time, is_restored) in enumerate(created, 1):
        values: dict[str, Any] = {"id": id, "email": f"user{id}@example.org", "created_at": time}
        (restored if is_restored else single).append(values)
    async with database.begin() as session:
        await session.execute(delete(User))
        for values in single:
            await session.execute(insert(User).values(values))
    if restored:
        request = BulkCreateUsersRequest(
            options=BulkOptions(restore=True),
            users=[
                UserMessage(**{**values, "created_at": timestamp(values["created_at"])})
                for values in restored
            ],
            finish=True,
        )
        assert (await load_once(users.BulkCreateUsers, request)).created == len(restored)


async def pages(users: UserServiceAsyncStub, most: int, **request: Any) -> list[int]:
    """Return the ids of a listing; stops after a limit of pages."""
    asked, ids = ListUsersRequest(**request), []
    for _ in range(most):
        page = await users.ListUsers(asked)
        ids += [user.id for user in page.users]
        asked.page_token = page.next_page_token
        if not asked.page_token:
            break
    return ids


# Each example begins by deleting what the one before it left, so they can share the database.
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(created=rows, compared=times, operation=st.sampled_from(sorted(COMPARE)))
@example(created=[(TEN, True)], compared=TEN, operation="=")
async def test_filters_compare_whole_seconds_and_fractions(
    database: Database,
    users: UserServiceAsyncStub,
    created: list[tuple[datetime, bool]],
    compared: datetime,
    operation: str,
) -> None:
    """Whether the rows were created one by one or restored."""
    await fill(database, users, created)
    expected = [id for id, (time, _) in enumerate(created, 1) if COMPARE[operation](time, compared)]
    found = await pages(users, 1, filter=f'created_at {operation} "{compared.isoformat()}"')
    assert found == expected


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(created=rows, descending=st.booleans(), page_size=st.integers(1, 3))
@example(created=[(TEN, True)] * 5, descending=False, page_size=2)
@example(created=[(TEN, True)] * 5, descending=True, page_size=2)
async def test_pages_by_time_show_each_row_once(
    database: Database,
    users: UserServiceAsyncStub,
    created: list[tuple[datetime, bool]],
    descending: bool,
    page_size: int,
) -> None:
    """In the order of the times, and of the ids for equal times."""
    await fill(database, users, created)
    keys = sorted(((time, id) for id, (time, _) in enumerate(created, 1)), reverse=descending)
    order_by = "created_at desc" if descending else "created_at"
    found = await pages(users, len(created) + 1, order_by=order_by, page_size=page_size)
    assert found == [id for _, id in keys]


async def test_restored_posts_of_a_whole_second_are_found(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Posts are written by the same code as users; `updated_at` is a time like any other."""
    ada = await users.CreateUser(CreateUserRequest(user=UserMessage(email="ada@example.org")))
    rows = [
        PostMessage(title=f"{number}", author_id=ada.id, created_at=timestamp(TEN), updated_at=timestamp(TEN))
        for number in range(3)
    ]
    request = BulkCreatePostsRequest(options=BulkOptions(restore=True), posts=rows, finish=True)
    assert (await load_once(posts.BulkCreatePosts, request)).created == 3

    equal = f'created_at = "{TEN.isoformat()}" AND updated_at >= "{TEN.isoformat()}"'
    page = await posts.ListPosts(ListPostsRequest(filter=equal, order_by="created_at", page_size=2))
    rest = await posts.ListPosts(
        ListPostsRequest(filter=equal, order_by="created_at", page_size=2, page_token=page.next_page_token)
    )
    assert [post.title for post in (*page.posts, *rest.posts)] == ["0", "1", "2"]


async def test_every_write_stores_times_with_six_digits_on_sqlite(sqlite_url: str) -> None:
    """SQLite compares the texts: those of creates, updates, bulk writes, restores, loads and requests."""
    async with serve(sqlite_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        users, posts = UserServiceStub(channel), PostServiceStub(channel)
        ada = await users.CreateUser(
            CreateUserRequest(
                user=UserMessage(email="ada@example.org"), request_id="5a1f0f2e-0000-4000-8000-000000000001"
            )
        )
        await users.UpdateUser(UpdateUserRequest(user=UserMessage(id=ada.id, full_name="Ada")))
        create = [UserMessage(email=f"{name}@example.org") for name in ("bob", "cyd")]
        restore = [
            UserMessage(email="dan@example.org", created_at=timestamp(TEN)),
            UserMessage(email="eve@example.org"),
        ]
        named = BulkOptions(load_id="staff")
        for request in (
            BulkCreateUsersRequest(options=named, users=create, finish=True),
            BulkCreateUsersRequest(options=BulkOptions(restore=True), users=restore, finish=True),
        ):
            await load_once(users.BulkCreateUsers, request)
        changed = BulkOptions()
        changed.update_mask.paths.append("full_name")
        await load_once(
            users.BulkUpdateUsers,
            BulkUpdateUsersRequest(
                options=changed, users=[UserMessage(id=ada.id, full_name="Countess")], finish=True
            ),
        )
        post = PostMessage(title="Notes", author_id=ada.id, updated_at=timestamp(TEN))
        restored = BulkCreatePostsRequest(options=BulkOptions(restore=True), posts=[post], finish=True)
        await load_once(posts.BulkCreatePosts, restored)

        columns = [
            column
            for table in Base.metadata.sorted_tables
            for column in table.columns
            if isinstance(column.type, UtcDateTime)
        ]
        written = set()
        async with server.database.read() as session:
            for column in columns:
                for stored in await session.scalars(select(cast(column, Text))):
                    assert FORM.fullmatch(stored), f"{column} has {stored}"
                    written.add(column.table.name)
    assert written == {"users", "posts", "requests", "bulk_loads", "changes"}


async def test_migration_completes_times_of_earlier_releases(sqlite_url: str) -> None:
    """Those that were stored without a fraction; the others stay as they are, down and up again."""
    given = ["2023-05-05 10:00:00", "0001-01-01 00:00:00", "2024-02-29 23:59:59.823000"]
    expected = ["2023-05-05 10:00:00.000000", "0001-01-01 00:00:00.000000", "2024-02-29 23:59:59.823000"]
    await downgrade(sqlite_url, "0004")
    engine = create_async_engine(sqlite_url)
    for id, time in enumerate(given, 1):
        await execute(
            engine,
            f"INSERT INTO users (id, email, created_at, updated_at) VALUES ({id}, 'u{id}', :time, :time)",
            f"INSERT INTO posts (title, content, author_id, created_at, updated_at) "
            f"VALUES ('', '', {id}, :time, :time)",
            time=time,
        )
    for _ in range(2):
        await upgrade(sqlite_url)
        async with engine.connect() as connection:
            for table in ("users", "posts"):
                for column in ("created_at", "updated_at"):
                    stored = text(f"SELECT {column} FROM {table} ORDER BY id")
                    assert (await connection.scalars(stored)).all() == expected
        await downgrade(sqlite_url, "0004")
    await engine.dispose()
