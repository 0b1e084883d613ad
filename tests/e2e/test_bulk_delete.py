"""Bulk deletes of users and posts, on both databases."""

from typing import Any

import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from roster.v1.bulk_pb2 import BulkAck, BulkOptions, BulkSummary, GetBulkLoadRequest
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.posts_pb2 import (
    BulkDeletePostsRequest,
    CreatePostRequest,
    GetPostRequest,
    ListPostsRequest,
    PostKey,
)
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkDeleteUsersRequest,
    CreateUserRequest,
    ListUsersRequest,
    UserKey,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.db import deletion
from tests.support.load_stream import load_once

NAMES = ("ada", "bob", "cyd")


@pytest.fixture
async def ids(users: UserServiceAsyncStub) -> list[int]:
    """The ids of three users."""
    created = [
        await users.CreateUser(CreateUserRequest(user=User(email=f"{name}@example.org"))) for name in NAMES
    ]
    return [user.id for user in created]


async def write_posts(posts: PostServiceAsyncStub, author_id: int, count: int = 1) -> list[int]:
    """Create posts of a user and return their ids."""
    request = CreatePostRequest(post=Post(author_id=author_id, title="Notes"))
    return [(await posts.CreatePost(request)).id for _ in range(count)]


async def remaining(users: UserServiceAsyncStub) -> list[str]:
    """Return the names of the users that exist."""
    listed = await users.ListUsers(ListUsersRequest())
    return [user.email.partition("@")[0] for user in listed.users]


async def events(rpc: Any, *requests: Any) -> tuple[list[BulkAck], BulkSummary]:
    """Run a stream and return its acks and its summary."""
    found = [event async for event in rpc(iter(requests))]
    return [event.ack for event in found if event.HasField("ack")], found[-1].summary


def reasons(ack: BulkAck) -> list[tuple[int, str, str]]:
    return [(failure.offset, failure.reason, failure.field) for failure in ack.failures]


async def test_deletes_users_with_their_posts(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ids: list[int]
) -> None:
    """By id, and by e-mail in any spelling; the posts are counted."""
    await write_posts(posts, ids[0], 2)
    [kept] = await write_posts(posts, ids[2])
    keys = [UserKey(id=ids[0], version=1), UserKey(email=" BOB@example.org")]

    [ack], summary = await events(
        users.BulkDeleteUsers,
        BulkDeleteUsersRequest(options=BulkOptions(return_ids=True), users=keys, finish=True),
    )

    assert (ack.deleted, ack.deleted_posts, list(ack.ids)) == (2, 2, ids[:2])
    assert (summary.deleted, summary.deleted_posts, summary.next_offset) == (2, 2, 2)
    assert await remaining(users) == ["cyd"]
    listed = await posts.ListPosts(ListPostsRequest())
    assert [post.id for post in listed.posts] == [kept]


async def test_deletes_posts(posts: PostServiceAsyncStub, ids: list[int]) -> None:
    """Other posts, and the author, stay."""
    first, second = await write_posts(posts, ids[0], 2)
    keys = [PostKey(id=first), PostKey(id=second, version=9)]

    ack = await load_once(posts.BulkDeletePosts, BulkDeletePostsRequest(posts=keys))

    assert (ack.deleted, ack.deleted_posts, reasons(ack)) == (1, 0, [(1, "VERSION_MISMATCH", "version")])
    assert (await posts.GetPost(GetPostRequest(id=second))).author_id == ids[0]


@pytest.mark.parametrize("again", ["id", "email"])
async def test_user_named_twice_is_deleted_once(
    users: UserServiceAsyncStub, ids: list[int], again: str
) -> None:
    """The second row finds no user, in the same message and in the next one."""
    key = UserKey(id=ids[0]) if again == "id" else UserKey(email="ada@example.org")
    requests = [
        BulkDeleteUsersRequest(users=[UserKey(id=ids[0]), key]),
        BulkDeleteUsersRequest(users=[key, UserKey(email="bob@example.org")]),
        BulkDeleteUsersRequest(users=[UserKey(id=ids[1])]),
    ]

    acks, _ = await events(users.BulkDeleteUsers, *requests)

    assert [reasons(ack) for ack in acks] == [[(n, "USER_NOT_FOUND", "")] for n in (1, 2, 4)]
    assert [ack.deleted for ack in acks] == [1, 1, 0]


async def test_skips_missing_rows_on_request(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ids: list[int]
) -> None:
    """They are counted as skipped, without an id."""
    options = BulkOptions(return_ids=True, on_missing=BulkOptions.SKIP_MISSING)
    keys = [UserKey(id=ids[0]), UserKey(id=ids[0]), UserKey(email="nobody@example.org"), UserKey(id=2**53)]

    ack = await load_once(users.BulkDeleteUsers, BulkDeleteUsersRequest(options=options, users=keys))
    of_posts = BulkDeletePostsRequest(options=options, posts=[PostKey(id=7)])

    assert (ack.deleted, ack.skipped, list(ack.ids)) == (1, 3, [ids[0], 0, 0, 0])
    assert (await load_once(posts.BulkDeletePosts, of_posts)).skipped == 1


async def test_invalid_keys_fail_their_rows(users: UserServiceAsyncStub, ids: list[int]) -> None:
    """Each failure names the field; the other rows are deleted."""
    keys = [
        UserKey(),
        UserKey(id=0),
        UserKey(id=-1),
        UserKey(id=2**53 + 1),
        UserKey(id=2**63 - 1),
        UserKey(email=""),
        UserKey(email="nobody"),
        UserKey(email="x" * 300 + "@example.org"),
        UserKey(email="nul\0@example.org"),
        UserKey(id=ids[0], version=-1),
        UserKey(id=ids[1]),
    ]

    ack = await load_once(users.BulkDeleteUsers, BulkDeleteUsersRequest(users=keys))

    fields = ["id"] * 5 + ["email"] * 4 + ["version"]
    assert reasons(ack) == [(row, "INVALID_FIELD", field) for row, field in enumerate(fields)]
    assert ack.deleted == 1
    assert await remaining(users) == ["ada", "cyd"]


async def test_restricted_delete_keeps_users_who_have_posts(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ids: list[int]
) -> None:
    """The others are deleted."""
    await write_posts(posts, ids[1])
    keys = [UserKey(id=id) for id in ids]

    request = BulkDeleteUsersRequest(options=BulkOptions(restrict=True), users=keys)
    ack = await load_once(users.BulkDeleteUsers, request)

    assert (ack.deleted, ack.deleted_posts, reasons(ack)) == (2, 0, [(1, "USER_HAS_POSTS", "")])
    assert await remaining(users) == ["bob"]


@pytest.mark.parametrize(
    "options", [BulkOptions(validate_only=True), BulkOptions(atomicity=BulkOptions.BATCH)]
)
async def test_deletes_nothing_if_nothing_is_to_be_written(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ids: list[int], options: BulkOptions
) -> None:
    """A dry run counts the posts; a batch that fails as a whole counts none."""
    await write_posts(posts, ids[0], 3)
    keys = [UserKey(id=ids[0]), UserKey(id=ids[1], version=9)]

    ack = await load_once(users.BulkDeleteUsers, BulkDeleteUsersRequest(options=options, users=keys))

    expected = (1, 3, 1) if options.validate_only else (0, 0, 2)
    assert (ack.deleted, ack.deleted_posts, ack.failed) == expected
    assert await remaining(users) == [*NAMES]


async def test_replays_counts_of_posts_row_by_row(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, channel: Any, ids: list[int]
) -> None:
    """A message cut in another way gets the counts of its rows; the load has the sums."""
    for id, count in zip(ids, (3, 0, 2), strict=True):
        await write_posts(posts, id, count)
    keys = [UserKey(id=id) for id in ids]
    options = BulkOptions(load_id="leavers", return_ids=True)
    await events(
        users.BulkDeleteUsers,
        BulkDeleteUsersRequest(options=options, users=keys[:2]),
        BulkDeleteUsersRequest(users=keys[2:]),
    )

    acks, summary = await events(
        users.BulkDeleteUsers,
        BulkDeleteUsersRequest(options=options, users=keys[:1]),
        BulkDeleteUsersRequest(users=keys[1:], finish=True),
    )

    assert [(ack.replayed, ack.deleted, ack.deleted_posts) for ack in acks] == [(True, 1, 3), (True, 2, 2)]
    assert [list(ack.ids) for ack in acks] == [ids[:1], ids[1:]]
    load = await BulkServiceStub(channel).GetBulkLoad(GetBulkLoadRequest(load_id="leavers"))
    assert (load.deleted, load.deleted_posts) == (summary.deleted, summary.deleted_posts) == (3, 5)
    assert load.method == "roster.v1.UserService.BulkDeleteUsers"


@pytest.mark.parametrize("validate_only", [False, True])
async def test_refuses_a_message_with_too_many_posts(
    users: UserServiceAsyncStub,
    posts: PostServiceAsyncStub,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    validate_only: bool,
) -> None:
    """The error has their number. The stream stays open for a smaller message."""
    monkeypatch.setattr(deletion, "MAX_DEPENDENTS", 4)
    await write_posts(posts, ids[0], 3)
    await write_posts(posts, ids[1], 2)
    options = BulkOptions(validate_only=validate_only)
    keys = [UserKey(id=id) for id in ids]

    acks, summary = await events(
        users.BulkDeleteUsers,
        BulkDeleteUsersRequest(options=options, offset=0, users=keys),
        BulkDeleteUsersRequest(offset=0, users=keys[:1]),
        BulkDeleteUsersRequest(offset=1, users=keys[1:], finish=True),
    )

    info = ErrorInfo()
    acks[0].error.details[0].Unpack(info)
    assert (info.reason, info.metadata["count"]) == ("TOO_LARGE", "5")
    assert "5 posts" in acks[0].error.message
    assert [ack.deleted_posts for ack in acks] == [0, 3, 2]
    assert summary.deleted == 3
