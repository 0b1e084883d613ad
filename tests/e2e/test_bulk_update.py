"""Users and posts updated in bulk, through the API."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.code_pb2 import ABORTED
from sqlalchemy import update

from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.posts_pb2 import BulkUpdatePostsRequest, CreatePostRequest, GetPostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import BulkUpdateUsersRequest, CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from service.users.model import User as UserRow
from tests.support.load_stream import email_taken, load_once
from tests.support.users import list_names, list_users

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
NOBODY = 1 << 40
HASH = "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$AAAAAAAAAAAAAAAAAAAAAA"


@pytest.fixture
async def people(users: UserServiceAsyncStub) -> list[User]:
    """Ada, Bob and Cyd."""
    rows = [User(email=f"{name}@example.org", full_name=name) for name in ("ada", "bob", "cyd")]
    return [await users.CreateUser(CreateUserRequest(user=row)) for row in rows]


async def update_users(
    users: UserServiceAsyncStub, *messages: list[User], mask: str, **options: Any
) -> list[BulkAck]:
    """Update users, and return the ack of each message."""
    chosen = BulkOptions(return_ids=True, update_mask=FieldMask(paths=mask.split()), **options)
    first, *others = [BulkUpdateUsersRequest(users=rows) for rows in messages]
    first.options.CopyFrom(chosen)
    events = [event async for event in users.BulkUpdateUsers(iter([first, *others]))]
    return [event.ack for event in events if event.HasField("ack")]


def rows_with_emails(people: list[User], *names: str) -> list[User]:
    """Return rows that give each user in turn the e-mail of a name."""
    return [User(id=user.id, email=f"{name}@example.org") for user, name in zip(people, names, strict=False)]


async def test_writes_only_fields_of_the_mask(
    server: Server, users: UserServiceAsyncStub, people: list[User]
) -> None:
    """Other fields are ignored, even invalid ones; an unset name becomes null."""
    ada, bob, cyd = people
    async with server.database.begin() as session:
        await session.execute(update(UserRow).where(UserRow.id != cyd.id).values(updated_at=LONG_AGO))
    rows = [
        User(id=bob.id, email="no e-mail", full_name="Robert", is_active=False),
        User(id=ada.id, is_active=False),
    ]

    (ack,) = await update_users(users, rows, mask="full_name is_active")

    new_ada, new_bob, new_cyd = await list_users(users)
    assert ack == BulkAck(next_offset=2, updated=2, ids=[bob.id, ada.id])
    assert (new_bob.email, new_bob.full_name, new_bob.is_active) == (bob.email, "Robert", False)
    assert (new_ada.HasField("full_name"), new_ada.is_active, new_cyd) == (False, False, cyd)
    assert (new_ada.version, new_bob.version, new_bob.created_at) == (2, 2, bob.created_at)
    assert new_bob.updated_at.ToDatetime(UTC) > LONG_AGO


async def test_star_means_every_writable_field(users: UserServiceAsyncStub, people: list[User]) -> None:
    """Each row needs all fields but the name; the password too."""
    bob = people[1]
    complete = User(id=bob.id, email="rob@example.org", is_active=False, hashed_password=HASH)

    (ack,) = await update_users(users, [complete, User(id=bob.id, email="x@example.org")], mask="*")

    (failure,) = ack.failures
    assert (failure.offset, failure.reason, failure.field) == (1, "INVALID_FIELD", "is_active")
    assert (await list_names(users))[1] == "rob"


async def test_last_row_of_a_user_wins(users: UserServiceAsyncStub, people: list[User]) -> None:
    """Each row is counted and increases the version, even if a later row overwrites it."""
    ada = people[0]
    rows = [User(id=ada.id, full_name=name) for name in ("A", "B", "C")]

    first, second = await update_users(users, rows[:2], rows[2:], mask="full_name")

    new = (await list_users(users))[0]
    assert (first.updated, second.updated, new.full_name, new.version) == (2, 1, "C", 4)


async def test_version_is_checked_after_earlier_rows(users: UserServiceAsyncStub, people: list[User]) -> None:
    """A row that gives a version is compared with the result of all earlier rows of the stream."""
    ada = people[0]
    rows = [
        User(id=ada.id, full_name=name, version=version)
        for name, version in zip("ABCD", (1, 1, 2, 3), strict=True)
    ]

    first, second = await update_users(users, rows[:3], rows[3:], mask="full_name")

    (failure,) = first.failures
    assert (failure.offset, failure.code, failure.reason) == (1, ABORTED, "VERSION_MISMATCH")
    assert (first.updated, second.updated) == (2, 1)
    new = (await list_users(users))[0]
    assert (new.full_name, new.version) == ("D", 4)


async def test_emails_can_be_swapped_in_one_message(users: UserServiceAsyncStub, people: list[User]) -> None:
    """Through a third address, as in single updates."""
    ada, bob, _ = people

    (ack,) = await update_users(
        users, rows_with_emails([ada, bob, ada], "temporary", "ada", "bob"), mask="email"
    )

    assert ack == BulkAck(next_offset=3, updated=3, ids=[ada.id, bob.id, ada.id])
    assert await list_names(users) == ["bob", "ada", "cyd"]
    assert [user.version for user in await list_users(users)] == [3, 2, 1]


async def test_emails_can_move_along_a_chain(users: UserServiceAsyncStub, people: list[User]) -> None:
    """Each row takes the address that the row before it left; in reverse order they fail."""
    ada, bob, cyd = people

    (ack,) = await update_users(users, rows_with_emails([ada, bob, cyd], "dan", "ada", "bob"), mask="email")
    (against,) = await update_users(
        users, rows_with_emails([cyd, bob, ada], "ada", "dan", "eve"), mask="email"
    )

    assert (ack.updated, against.updated) == (3, 1)
    assert list(against.failures) == [email_taken(0, bob.id), email_taken(1, ada.id)]
    assert await list_names(users) == ["eve", "ada", "bob"]


@pytest.mark.parametrize("options", [{"atomicity": "BATCH"}, {"validate_only": True}])
async def test_unwritten_batch_changes_no_email(
    users: UserServiceAsyncStub, people: list[User], options: dict[str, Any]
) -> None:
    """Rows that could succeed change nothing if their batch fails or is only validated."""
    ada, bob, cyd = people

    (ack,) = await update_users(
        users, rows_with_emails([ada, bob, cyd, ada], "dan", "ada", "bob", "ada"), mask="email", **options
    )

    assert list(ack.failures) == [email_taken(3, bob.id)]
    assert await list_users(users) == people


async def test_unknown_user_fails_its_row(users: UserServiceAsyncStub, people: list[User]) -> None:
    """The row uses an offset; the other rows are written."""
    rows = [User(id=id, is_active=False) for id in (people[0].id, NOBODY, people[2].id)]

    (ack,) = await update_users(users, rows, mask="is_active")

    (failure,) = ack.failures
    assert (failure.offset, failure.reason) == (1, "USER_NOT_FOUND")
    assert ack.ids == [people[0].id, 0, people[2].id]
    assert [user.is_active for user in await list_users(users)] == [False, True, False]


async def test_updates_posts(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, people: list[User]
) -> None:
    """Title and content are updated by id; the author stays, and unset content becomes empty."""
    row = Post(author_id=people[0].id, title="Notes", content="...")
    notes, more = [await posts.CreatePost(CreatePostRequest(post=row)) for _ in range(2)]
    rows = [
        Post(id=notes.id, title="New", author_id=people[1].id, version=1),
        Post(id=more.id, title="", content="new"),
        Post(id=NOBODY, title="New"),
    ]
    options = BulkOptions(update_mask=FieldMask(paths=["title", "content"]), return_ids=True)

    request = BulkUpdatePostsRequest(options=options, posts=rows, finish=True)
    ack = await load_once(posts.BulkUpdatePosts, request)

    assert (ack.updated, list(ack.ids)) == (1, [notes.id, 0, 0])
    assert [(failure.reason, failure.field) for failure in ack.failures] == [
        ("INVALID_FIELD", "title"),
        ("POST_NOT_FOUND", ""),
    ]
    new, same = [await posts.GetPost(GetPostRequest(id=post.id)) for post in (notes, more)]
    assert (new.title, new.content, new.author_id, new.version) == ("New", "", people[0].id, 2)
    assert same == more
