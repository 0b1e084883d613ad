"""Restores: rows with their ids, times and versions, together with rows that draw new ids."""

import asyncio
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.code_pb2 import ALREADY_EXISTS
from sqlalchemy import insert, text

from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest, CreatePostRequest, GetPostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.db.bulk import postgresql
from service.server import Server
from service.users.model import User as UserRow
from tests.support.load_stream import load_once, named
from tests.support.rival import until
from tests.support.users import list_users

BATCHES, BATCH = 15, 10
WAITS_FOR_THE_TABLE = text(
    "SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted "
    "AND mode = 'ShareRowExclusiveLock'"
)


async def create_users(users: UserServiceAsyncStub, *rows: User, **options: Any) -> BulkAck:
    """Create users in one message and return its ack."""
    chosen = BulkOptions(return_ids=True, **options)
    request = BulkCreateUsersRequest(options=chosen, users=rows, finish=True)
    return await load_once(users.BulkCreateUsers, request)


async def restore_users(users: UserServiceAsyncStub, *rows: User, **options: Any) -> BulkAck:
    """Restore users in one message and return its ack."""
    return await create_users(users, *rows, restore=True, **options)


async def restore_posts(posts: PostServiceAsyncStub, *rows: Post, **options: Any) -> BulkAck:
    """Restore posts in one message and return its ack."""
    chosen = BulkOptions(restore=True, return_ids=True, **options)
    request = BulkCreatePostsRequest(options=chosen, posts=rows, finish=True)
    return await load_once(posts.BulkCreatePosts, request)


async def create_user(users: UserServiceAsyncStub, name: str) -> User:
    return await users.CreateUser(CreateUserRequest(user=User(email=f"{name}@example.org")))


async def names_by_id(users: UserServiceAsyncStub) -> dict[int, str]:
    """Return the names of all users by their ids."""
    return {user.id: user.email.removesuffix("@example.org") for user in await list_users(users)}


def parse_time(text: str) -> Timestamp:
    """Return a time given as in RFC 3339."""
    time = Timestamp()
    time.FromJsonString(text)
    return time


async def test_restored_user_keeps_id_version_and_times(users: UserServiceAsyncStub) -> None:
    """Times are truncated to microseconds."""
    row = User(
        id=4711,
        email="ada@example.org",
        full_name="Ada",
        is_active=False,
        version=7,
        created_at=parse_time("1815-12-10T00:00:00.000001Z"),
        updated_at=parse_time("2024-02-29T23:59:59.123456789Z"),
    )

    ack = await restore_users(users, row)

    row.updated_at.nanos = 123456000
    assert (ack.created, ack.ids) == (1, [4711])
    assert await users.GetUser(GetUserRequest(id=4711)) == row


async def test_unset_control_fields_get_defaults(users: UserServiceAsyncStub) -> None:
    """Each of id, version and times by itself, as in a new user."""
    old, zero = parse_time("2001-01-01T00:00:00Z"), Timestamp()
    new = await create_user(users, "new")

    ack = await restore_users(
        users, *named("a", id=100), *named("b", created_at=old), *named("c", updated_at=zero, version=3)
    )

    a, b, c = [await users.GetUser(GetUserRequest(id=id)) for id in ack.ids]
    assert (a.id, b.id, c.id) == (100, 101, 102)
    assert (a.version, b.version, c.version) == (1, 1, 3)
    assert (b.created_at, c.updated_at) == (old, zero)
    for given in (a.created_at, a.updated_at, b.updated_at, c.created_at):
        assert given.ToNanoseconds() >= new.created_at.ToNanoseconds()


async def test_restored_post_keeps_id_version_and_times(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Its author is given by id or e-mail; posts without an id draw one above the restored ids."""
    ada = await create_user(users, "ada")
    row = Post(
        id=4711,
        title="Notes",
        content="On the engine",
        author_id=ada.id,
        version=2,
        created_at=parse_time("1843-07-01T12:00:00.5Z"),
        updated_at=parse_time("1843-10-01T12:00:00.000001Z"),
    )

    ack = await restore_posts(posts, row, Post(title="More", author_email="ada@example.org"))

    assert (ack.created, ack.ids) == (2, [4711, 4712])
    assert await posts.GetPost(GetPostRequest(id=4711)) == row
    assert (await posts.CreatePost(CreatePostRequest(post=Post(title="New", author_id=ada.id)))).id == 4713


async def test_taken_id_or_email_fails_its_row(users: UserServiceAsyncStub) -> None:
    """The failure names the owner, a stored user or an earlier row; other rows are restored."""
    ada = await create_user(users, "ada")

    ack = await restore_users(
        users,
        *named("bob", id=ada.id),
        *named("ada", id=50),
        *named("cyd", id=51),
        *named("dan", id=51),
        *named("cyd", id=52),
        *named("ada", id=ada.id),
        *named("eve"),
    )

    assert [
        (failure.offset, failure.code, failure.reason, failure.field, failure.existing_id)
        for failure in ack.failures
    ] == [
        (0, ALREADY_EXISTS, "ID_TAKEN", "id", ada.id),
        (1, ALREADY_EXISTS, "EMAIL_TAKEN", "email", ada.id),
        (3, ALREADY_EXISTS, "ID_TAKEN", "id", 51),
        (4, ALREADY_EXISTS, "EMAIL_TAKEN", "email", 51),
        (5, ALREADY_EXISTS, "ID_TAKEN", "id", ada.id),
    ]
    assert (ack.created, ack.failed) == (2, 5)
    assert await names_by_id(users) == {ada.id: "ada", 51: "cyd", ack.ids[6]: "eve"}


async def test_taken_id_or_email_is_skipped(users: UserServiceAsyncStub) -> None:
    """The stored user stays unchanged, and its id is returned."""
    ada = await create_user(users, "ada")

    rows = [*named("bob", id=ada.id), *named("ada", id=50), *named("cyd", id=51), *named("dan", id=51)]
    ack = await restore_users(users, *rows, on_conflict="SKIP")

    assert (ack.created, ack.skipped, ack.ids) == (1, 3, [ada.id, ada.id, 51, 51])
    assert await users.GetUser(GetUserRequest(id=ada.id)) == ada
    assert await names_by_id(users) == {ada.id: "ada", 51: "cyd"}


async def test_taken_post_id_fails_or_is_skipped(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """The id is the only key of a post."""
    ada = await create_user(users, "ada")
    rows = [Post(id=5, title=title, author_id=ada.id) for title in ("First", "Second")]

    failing = await restore_posts(posts, *rows)
    skipping = await restore_posts(posts, *rows, on_conflict="SKIP")

    assert (failing.created, failing.ids, failing.failures[0].reason) == (1, [5, 0], "ID_TAKEN")
    assert (skipping.skipped, skipping.ids) == (2, [5, 5])
    assert (await posts.GetPost(GetPostRequest(id=5))).title == "First"


async def test_invalid_control_field_fails_its_row(users: UserServiceAsyncStub) -> None:
    """An id, a version or a time outside its range."""
    ack = await restore_users(
        users,
        *named("a", id=-1),
        *named("b", id=2**53 + 1),
        *named("c", version=-1),
        *named("d", created_at=Timestamp(seconds=253_402_300_800)),
        *named("e", updated_at=Timestamp(nanos=1_000_000_000)),
        *named("f", id=7),
    )

    assert [(failure.offset, failure.field) for failure in ack.failures] == [
        (0, "id"),
        (1, "id"),
        (2, "version"),
        (3, "created_at"),
        (4, "updated_at"),
    ]
    assert await names_by_id(users) == {7: "f"}


async def test_restores_ids_beyond_32_bits(users: UserServiceAsyncStub) -> None:
    """New ids continue after them."""
    large = [2**31, 2**32 + 1, 2**53 - 2]
    rows = [User(id=id, email=f"user{id}@example.org") for id in large]

    ack = await restore_users(users, *rows, *named("next"))
    following = await create_user(users, "last")

    assert (list(ack.ids), following.id) == ([*large, 2**53 - 1], 2**53)


async def test_taken_id_fails_an_atomic_batch(users: UserServiceAsyncStub) -> None:
    """No row of the message is restored."""
    ada = await create_user(users, "ada")

    ack = await restore_users(users, *named("bob", id=50), *named("cyd", id=ada.id), atomicity="BATCH")

    assert (ack.created, ack.failed, [failure.offset for failure in ack.failures]) == (0, 2, [1])
    assert await names_by_id(users) == {ada.id: "ada"}


async def test_validation_restores_nothing(users: UserServiceAsyncStub) -> None:
    """It does not advance the next id either."""
    ack = await restore_users(users, *named("a", id=1_000_000), validate_only=True)

    assert (ack.created, ack.ids) == (1, [0])
    assert (await create_user(users, "b")).id < 1_000_000


async def test_restores_id_of_a_deleted_row(users: UserServiceAsyncStub) -> None:
    """It is below the last id drawn, which stays the same."""
    await restore_users(users, *named("a", id=100))

    ack = await restore_users(users, *named("b", id=50))

    assert ack.ids == [50]
    assert (await create_user(users, "c")).id == 101


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_restore_waits_for_drawn_ids(server: Server, users: UserServiceAsyncStub) -> None:
    """A create that has drawn an id and not yet written it keeps the id."""
    async with server.database.begin() as create:
        (drawn,) = await postgresql.next_ids(create, UserRow, 1)
        restore = asyncio.create_task(
            restore_users(users, *named("late", id=drawn), *named("later", id=drawn + 1))
        )
        async with server.database.read() as session:
            await until(lambda: _waits(session))
        await create.execute(insert(UserRow).values(id=drawn, email="early@example.org"))

    ack = await restore
    assert (ack.created, ack.failed, ack.ids) == (1, 1, [0, drawn + 1])
    assert await names_by_id(users) == {drawn: "early", drawn + 1: "later"}


async def _waits(session: Any) -> bool:
    return bool(await session.scalar(WAITS_FOR_THE_TABLE))


class Clients:
    """Clients that create and restore users; `reported` has the names that they got an answer for, by id."""

    def __init__(self, users: UserServiceAsyncStub) -> None:
        self.users = users
        self.reported: dict[int, str] = {}

    async def create(self, number: int) -> None:
        """Create users one by one."""
        for name in (f"single{number}-{step}" for step in range(BATCHES)):
            self._tell((await create_user(self.users, name)).id, name)

    async def create_in_bulk(self, number: int) -> None:
        """Create users in batches."""
        for step in range(BATCHES):
            names = [f"bulk{number}-{step}-{row}" for row in range(BATCH)]
            ack = await create_users(self.users, *named(*names))
            assert ack.created == BATCH
            for id, name in zip(ack.ids, names, strict=True):
                self._tell(id, name)

    async def restore(self, number: int) -> None:
        """Restore users with ids close to those being drawn."""
        for step in range(BATCHES):
            first = max(self.reported, default=0) + 1 + step % 5 * BATCH
            names = {id: f"old{number}-{step}-{id}" for id in range(first, first + BATCH)}
            ack = await create_users(
                self.users, *(named(name, id=id)[0] for id, name in names.items()), restore=True
            )
            assert {failure.reason for failure in ack.failures} <= {"ID_TAKEN"}
            for id in filter(None, ack.ids):
                self._tell(id, names[id])

    def _tell(self, id: int, name: str) -> None:
        assert self.reported.setdefault(id, name) == name


async def test_concurrent_creates_and_restores_do_not_collide(users: UserServiceAsyncStub) -> None:
    """No create meets a taken id; each reported user is stored under the reported id."""
    clients = Clients(users)
    async with asyncio.TaskGroup() as tasks:
        for number in range(2):
            for work in (clients.create, clients.create_in_bulk, clients.restore):
                tasks.create_task(work(number))

    assert await names_by_id(users) == clients.reported
    assert len(clients.reported) > 2 * BATCHES * (1 + BATCH)  # all creates and some restores
