"""Users and posts created in bulk, through the API."""

import csv
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.posts_pb2 import BatchGetPostsRequest, BulkCreatePostsRequest, GetPostRequest, ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    CreateUserRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from tests.support.load_stream import email_taken, load_once, named
from tests.support.users import list_users

MAX_CONTENT_BYTES = 1 << 20
TEXTS = ["\U0001d49c\U0001f600", "a\r\nb\rc\n", "\\N", "\\.", "a\tb\\", "\"{},'", "\ufeff\u2028\x7f", "NULL"]
HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture
async def ada(users: UserServiceAsyncStub) -> User:
    """A stored user."""
    return await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org", full_name="Ada")))


async def create_users(users: UserServiceAsyncStub, rows: list[User], **options: Any) -> BulkAck:
    """Create users in one message and return its ack."""
    chosen = BulkOptions(return_ids=True, **options)
    request = BulkCreateUsersRequest(options=chosen, users=rows, finish=True)
    return await load_once(users.BulkCreateUsers, request)


async def create_posts(posts: PostServiceAsyncStub, rows: list[Post], **options: Any) -> BulkAck:
    """Create posts in one message and return its ack."""
    chosen = BulkOptions(return_ids=True, **options)
    request = BulkCreatePostsRequest(options=chosen, posts=rows, finish=True)
    return await load_once(posts.BulkCreatePosts, request)


async def test_creates_users_in_file_order(users: UserServiceAsyncStub) -> None:
    """Ids rise in file order, whatever the e-mails; unset fields get the defaults of CreateUser."""
    rows = [
        User(email=" Zoe@Example.org", full_name="Zoe", is_active=False),
        User(email="ada@example.org"),
        User(email="bob@example.org", full_name=""),
    ]

    ack = await create_users(users, rows)

    zoe, ada, bob = await list_users(users)
    assert ack == BulkAck(next_offset=3, created=3, ids=[zoe.id, ada.id, bob.id])
    assert (zoe.email, zoe.full_name, zoe.is_active) == ("zoe@example.org", "Zoe", False)
    assert (ada.HasField("full_name"), ada.is_active, ada.version) == (False, True, 1)
    assert (bob.HasField("full_name"), bob.full_name) == (True, "")
    assert zoe.created_at == zoe.updated_at == bob.created_at


async def test_returns_ids_in_row_order(users: UserServiceAsyncStub) -> None:
    """Also for a large batch, whose rows are written in another order."""
    rows = named(*(f"{number * 7919 % 1000:03}" for number in range(1000)))

    ack = await create_users(users, rows)

    found = await users.BatchGetUsers(BatchGetUsersRequest(ids=ack.ids))
    assert [user.email for user in found.users] == [row.email for row in rows]


async def test_taken_email_fails_its_row(users: UserServiceAsyncStub, ada: User) -> None:
    """The failure names the owner, a stored user or an earlier row; other rows are created."""
    ack = await create_users(users, named("ada", "bob", "bob", "cyd"))

    _, bob, cyd = await list_users(users)
    assert ack == BulkAck(
        next_offset=4,
        created=2,
        failed=2,
        ids=[0, bob.id, 0, cyd.id],
        failures=[email_taken(0, ada.id), email_taken(2, bob.id)],
    )


async def test_taken_email_is_skipped(users: UserServiceAsyncStub, ada: User) -> None:
    """The stored user and the first of two rows stay unchanged."""
    rows = [*named("ada", full_name="Other"), *named("bob"), *named("bob", full_name="Other")]

    ack = await create_users(users, rows, on_conflict="SKIP")

    stored, bob = await list_users(users)
    assert ack == BulkAck(next_offset=3, created=1, skipped=2, ids=[ada.id, bob.id, bob.id])
    assert stored == ada
    assert (bob.HasField("full_name"), bob.version) == (False, 1)


async def test_taken_email_updates_its_user(users: UserServiceAsyncStub, ada: User) -> None:
    """The last of several rows wins in the fields of the mask, and each of them is counted."""
    rows = [
        User(email="ada@example.org", full_name="First", is_active=False),
        User(email="bob@example.org", full_name="First", is_active=False),
        User(email="ada@example.org", full_name="Last"),
        User(email="bob@example.org"),
    ]

    ack = await create_users(users, rows, on_conflict="UPDATE", update_mask=FieldMask(paths=["full_name"]))

    stored, bob = await list_users(users)
    assert ack == BulkAck(next_offset=4, created=1, updated=3, ids=[ada.id, bob.id, ada.id, bob.id])
    assert (stored.full_name, stored.is_active, stored.version) == ("Last", True, 3)
    assert (bob.HasField("full_name"), bob.is_active, bob.version) == (False, False, 2)
    assert stored.created_at == ada.created_at


async def test_bad_row_fails_an_atomic_batch(users: UserServiceAsyncStub, ada: User) -> None:
    """No row of the message is written and all count as failed; only the bad rows are reported."""
    ack = await create_users(users, named("bob", "ada", "cyd"), atomicity="BATCH")

    assert ack == BulkAck(next_offset=3, failed=3, ids=[0, 0, 0], failures=[email_taken(1, ada.id)])
    assert await list_users(users) == [ada]


async def test_validation_writes_nothing(users: UserServiceAsyncStub, ada: User) -> None:
    """All checks are made and counted; a row that would be created has no id."""
    ack = await create_users(users, named("bob", "ada", "bob"), validate_only=True)

    assert ack == BulkAck(
        next_offset=3,
        created=1,
        failed=2,
        ids=[0, 0, 0],
        failures=[email_taken(1, ada.id), email_taken(2, 0)],
    )
    assert await list_users(users) == [ada]


async def test_loaded_hash_verifies_its_password(users: UserServiceAsyncStub) -> None:
    """Users loaded with a hash can log in with their password."""
    await create_users(users, [User(email="bob@example.org", hashed_password=HASHER.hash("open sesame"))])

    for password, valid in [("open sesame", True), ("open barley", False)]:
        request = VerifyPasswordRequest(email="bob@example.org", password=password)
        assert (await users.VerifyPassword(request)).valid == valid


async def test_texts_are_stored_unchanged(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ada: User
) -> None:
    """Including those that COPY or JSON would treat as syntax."""
    people = await create_users(
        users, [User(email=f"{i}@example.org", full_name=text) for i, text in enumerate(TEXTS)]
    )
    ack = await create_posts(posts, [Post(author_id=ada.id, title=text, content=text) for text in TEXTS])

    found = await users.BatchGetUsers(BatchGetUsersRequest(ids=people.ids))
    stored = await posts.BatchGetPosts(BatchGetPostsRequest(ids=ack.ids))
    assert [user.full_name for user in found.users] == TEXTS
    assert [(post.title, post.content) for post in stored.posts] == [(text, text) for text in TEXTS]


async def test_content_is_limited_to_one_mebibyte(posts: PostServiceAsyncStub, ada: User) -> None:
    """It is counted in bytes of UTF-8; one byte more fails its row only."""
    largest = "\U0001d49c" * (MAX_CONTENT_BYTES // 4)
    rows = [
        Post(author_id=ada.id, title="Notes", content=content) for content in ("", largest, largest + "x")
    ]

    ack = await create_posts(posts, rows)

    (failure,) = ack.failures
    assert (failure.offset, failure.reason, failure.field) == (2, "INVALID_FIELD", "content")
    stored = [await posts.GetPost(GetPostRequest(id=id)) for id in ack.ids[:2]]
    assert [post.content for post in stored] == ["", largest]


async def test_author_is_given_by_id_or_email(posts: PostServiceAsyncStub, ada: User) -> None:
    """Exactly one of them, and the user must exist; each row is checked by itself."""
    rows = [
        Post(title="Notes", author_id=ada.id),
        Post(title="Notes", author_email=" ADA@example.org"),
        Post(title="Notes"),
        Post(title="Notes", author_id=ada.id, author_email=ada.email),
        Post(title="Notes", author_id=ada.id + 1),
        Post(title="Notes", author_email="bob@example.org"),
    ]

    ack = await create_posts(posts, rows)

    assert [(failure.offset, failure.reason, failure.field) for failure in ack.failures] == [
        (2, "INVALID_FIELD", "author_id"),
        (3, "INVALID_FIELD", "author_email"),
        (4, "AUTHOR_NOT_FOUND", "author_id"),
        (5, "AUTHOR_NOT_FOUND", "author_email"),
    ]
    stored = [await posts.GetPost(GetPostRequest(id=id)) for id in ack.ids[:2]]
    assert [post.author_id for post in stored] == [ada.id] * 2


async def test_unknown_author_fails_an_atomic_batch(posts: PostServiceAsyncStub, ada: User) -> None:
    """No post of the message is written."""
    rows = [Post(title="Notes", author_id=ada.id), Post(title="Notes", author_email="bob@example.org")]

    ack = await create_posts(posts, rows, atomicity="BATCH")

    assert (ack.created, ack.failed, list(ack.ids), len(ack.failures)) == (0, 2, [0, 0], 1)
    assert not (await posts.ListPosts(ListPostsRequest())).posts


async def test_loads_hashes_of_other_systems(users: UserServiceAsyncStub) -> None:
    """Each owner can log in; hashes that can't be checked fail their own rows, with the reason."""
    with (Path(__file__).parents[1] / "data/field/hashes.csv").open(newline="") as lines:
        known = list(csv.DictReader(lines))
    hashes = [row["hash"] for row in known] + [
        "$6$salt$" + "a" * 86,
        known[0]["hash"] + "\n" + known[1]["hash"],
    ]
    rows = [User(email=f"u{row}@example.org", hashed_password=text) for row, text in enumerate(hashes)]

    ack = await create_users(users, rows)

    assert ack.created == len(known)
    crypt, joined = ack.failures
    assert (crypt.offset, crypt.field) == (len(known), "hashed_password")
    assert crypt.message.startswith("hashed_password is sha512-crypt, which is not accepted")
    assert joined.offset == len(known) + 1
    for row, id in zip(known, ack.ids, strict=False):
        for password in (row["password"], row["password"][:-1]):
            answer = await users.VerifyPassword(VerifyPasswordRequest(id=id, password=password))
            assert answer.valid is (password == row["password"])
