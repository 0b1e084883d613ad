"""Single users and batches of users, through the API."""

import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BatchGetUsersResponse,
    CreateUserRequest,
    DeleteUserRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.errors import refusal
from tests.support.rows import add_posts, add_users
from tests.support.users import list_users

MAX_ANSWER_BYTES = 3 << 20
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQxMjM0NTY$dGhpcyBpcyBub3QgYSBoYXNoIGF0IGFsbA"
# Composed, decomposed, with space around it, in capitals.
SPELLINGS = (
    "\u00e9va@example.org",
    "e\u0301va@example.org",
    " \u00e9va@example.org\n",
    "\u00c9VA@Example.ORG",
)


@pytest.fixture
async def ada(users: UserServiceAsyncStub) -> User:
    """A user with every field set."""
    user = User(email="ada@example.org", full_name="Ada", is_active=True)
    return await users.CreateUser(CreateUserRequest(user=user))


async def test_new_user_has_id_version_and_times(users: UserServiceAsyncStub) -> None:
    """By default it is active and has no name."""
    before = datetime.now(UTC)
    created = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))

    assert created == User(
        id=1,
        email="ada@example.org",
        is_active=True,
        version=1,
        created_at=created.created_at,
        updated_at=created.created_at,
    )
    assert abs(created.created_at.ToDatetime(UTC) - before) < timedelta(minutes=1)


async def test_new_user_keeps_its_fields(users: UserServiceAsyncStub) -> None:
    """An empty name differs from none; output-only fields are ignored."""
    sent = User(
        id=4711, email="ada@example.org", full_name="", is_active=False, version=9, posts=[Post(id=1)]
    )
    created = await users.CreateUser(CreateUserRequest(user=sent))

    assert (created.id, created.version, list(created.posts)) == (1, 1, [])
    assert (created.HasField("full_name"), created.full_name, created.is_active) == (True, "", False)
    assert await users.GetUser(GetUserRequest(id=1)) == created


async def test_email_is_normalised_everywhere(users: UserServiceAsyncStub) -> None:
    """When it is stored, looked up, filtered and compared."""
    for email in SPELLINGS:
        created = await users.CreateUser(CreateUserRequest(user=User(email=email)))
        assert created.email == "\u00e9va@example.org"
        for spelling in SPELLINGS:
            assert await users.GetUser(GetUserRequest(email=spelling)) == created
            found = await users.ListUsers(ListUsersRequest(filter=f'email = "{spelling}"'))
            assert list(found.users) == [created]
            taken = await refusal(users.CreateUser(CreateUserRequest(user=User(email=spelling))))
            assert taken.reason == "EMAIL_TAKEN"
        await users.DeleteUser(DeleteUserRequest(id=created.id))


async def test_taken_email_is_refused_with_its_owner(users: UserServiceAsyncStub, ada: User) -> None:
    """In creates and updates."""
    alan = await users.CreateUser(CreateUserRequest(user=User(email="alan@example.org")))
    refusals = [
        await refusal(users.CreateUser(CreateUserRequest(user=User(email=ada.email)))),
        await refusal(users.UpdateUser(UpdateUserRequest(user=User(id=alan.id, email=ada.email)))),
    ]

    for taken in refusals:
        assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
        assert taken.facts == {"existing_id": str(ada.id)}
    assert await list_users(users) == [ada, alan]


async def test_unknown_user_is_not_found(users: UserServiceAsyncStub) -> None:
    """By id and by e-mail, in updates and deletes."""
    for call in (
        users.GetUser(GetUserRequest(id=4711)),
        users.GetUser(GetUserRequest(email="nobody@example.org")),
        users.UpdateUser(UpdateUserRequest(user=User(id=4711, full_name="Nobody"))),
        users.UpdateUser(UpdateUserRequest(user=User(id=4711, full_name="Nobody", version=1))),
        users.DeleteUser(DeleteUserRequest(id=4711)),
        users.DeleteUser(DeleteUserRequest(id=4711, version=1)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND")


async def test_view_adds_the_newest_50_posts(server: Server, users: UserServiceAsyncStub) -> None:
    """Newest first, without contents, on request."""
    (id,) = await add_users(server.database)
    ids = await add_posts(server.database, [id] * 51, content="long")

    user = await users.GetUser(GetUserRequest(id=id, view=User.WITH_POSTS))
    assert [post.id for post in user.posts] == ids[:0:-1]
    assert not any(post.HasField("content") for post in user.posts)
    newest = user.posts[0]
    assert (newest.title, newest.author_id, newest.version) == ("Post 50", id, 1)
    assert newest.created_at == newest.updated_at

    assert not (await users.GetUser(GetUserRequest(id=id))).posts


async def test_batch_has_users_in_requested_order(server: Server, users: UserServiceAsyncStub) -> None:
    """Each once, at its first place; missing ids are listed separately."""
    first, second, third = await add_users(server.database, 3)

    request = BatchGetUsersRequest(ids=[third, 4711, first, third, 4712, second, 4711])
    answer = await users.BatchGetUsers(request)
    assert [user.id for user in answer.users] == [third, first, second]
    assert list(answer.missing_ids) == [4711, 4712]
    assert list(answer.remaining_ids) == []
    assert answer.users[1] == await users.GetUser(GetUserRequest(id=first))


async def test_batch_of_1000_largest_users_fits(server: Server, users: UserServiceAsyncStub) -> None:
    """No ids remain."""
    ids = await add_users(server.database, 1000, full_name="😀" * 255)

    answer = await users.BatchGetUsers(BatchGetUsersRequest(ids=ids))
    assert [user.id for user in answer.users] == ids
    assert answer.ByteSize() <= MAX_ANSWER_BYTES


async def test_batch_with_posts_is_cut_at_3_mib(server: Server, users: UserServiceAsyncStub) -> None:
    """Repeated calls for the remaining ids return all users."""
    ids = await add_users(server.database, 80)
    await add_posts(server.database, ids * 50, title="😀" * 255)

    answers: list[BatchGetUsersResponse] = []
    remaining = [*ids[:40], 4711, *ids[40:], 4712]
    while remaining:
        request = BatchGetUsersRequest(ids=remaining, view=User.WITH_POSTS)
        answers.append(await users.BatchGetUsers(request))
        remaining = list(answers[-1].remaining_ids)
    assert len(answers) == 2
    assert all(answer.ByteSize() <= MAX_ANSWER_BYTES for answer in answers)
    found = [user for answer in answers for user in answer.users]
    assert [(user.id, len(user.posts)) for user in found] == [(id, 50) for id in ids]
    assert [id for answer in answers for id in answer.missing_ids] == [4711, 4712]


async def test_update_without_mask_writes_set_fields(users: UserServiceAsyncStub, ada: User) -> None:
    """The response is the updated user with the next version."""
    updated = await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, is_active=False)))

    expected = User(updated_at=updated.updated_at)
    expected.MergeFrom(User(id=ada.id, email=ada.email, full_name="Ada", is_active=False, version=2))
    expected.created_at.CopyFrom(ada.created_at)
    assert updated == expected
    assert await users.GetUser(GetUserRequest(id=ada.id)) == updated


@pytest.mark.parametrize(
    ("sent", "mask", "expected"),
    [
        (User(full_name="Countess", is_active=False), ["full_name"], ("ada@example.org", "Countess", True)),
        (User(is_active=False), ["full_name"], ("ada@example.org", None, True)),
        (User(email="A@B.org", is_active=False), ["*"], ("a@b.org", None, False)),
    ],
    ids=["named", "named but unset", "every field"],
)
async def test_update_with_mask_writes_named_fields(
    users: UserServiceAsyncStub,
    ada: User,
    sent: User,
    mask: list[str],
    expected: tuple[str, str | None, bool],
) -> None:
    """Only those; an unset name becomes null."""
    request = UpdateUserRequest(user=sent, update_mask=FieldMask(paths=mask))
    request.user.id = ada.id
    await users.UpdateUser(request)

    user = await users.GetUser(GetUserRequest(id=ada.id))
    name = user.full_name if user.HasField("full_name") else None
    assert (user.email, name, user.is_active) == expected


@pytest.mark.parametrize("path", ["email", "is_active", "hashed_password"])
async def test_update_refuses_null_for_required_fields(
    users: UserServiceAsyncStub, ada: User, path: str
) -> None:
    """Nothing is written."""
    mask = FieldMask(paths=["full_name", path])
    refused = await refusal(users.UpdateUser(UpdateUserRequest(user=User(id=ada.id), update_mask=mask)))

    assert (refused.reason, refused.fields) == ("INVALID_FIELD", [f"user.{path}"])
    assert await users.GetUser(GetUserRequest(id=ada.id)) == ada


async def test_expected_version_must_be_current(users: UserServiceAsyncStub, ada: User) -> None:
    """In updates and deletes, unless it is 0. The error has the current version."""
    await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, full_name="Countess", version=1)))
    for call in (
        users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, full_name="Ada", version=1))),
        users.DeleteUser(DeleteUserRequest(id=ada.id, version=1)),
        users.DeleteUser(DeleteUserRequest(id=ada.id, version=3)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH")
        assert refused.facts == {"version": "2"}

    await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, full_name="Lovelace")))
    assert await users.DeleteUser(DeleteUserRequest(id=ada.id, version=3)) == Empty()


async def test_one_of_two_updates_of_a_version_succeeds(users: UserServiceAsyncStub, ada: User) -> None:
    """The other gets an error."""
    requests = [
        UpdateUserRequest(user=User(id=ada.id, full_name=name, version=1)) for name in ("Augusta", "Byron")
    ]
    answers = await asyncio.gather(
        *(users.UpdateUser(request) for request in requests), return_exceptions=True
    )

    (accepted,) = [answer for answer in answers if isinstance(answer, User)]
    (refused,) = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert refused.code() is grpc.StatusCode.ABORTED
    assert await users.GetUser(GetUserRequest(id=ada.id)) == accepted


async def test_concurrent_updates_each_increase_the_version(users: UserServiceAsyncStub, ada: User) -> None:
    """Without an expected version all succeed."""
    updated = await asyncio.gather(
        *(
            users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, full_name=str(number))))
            for number in range(10)
        )
    )

    assert sorted(user.version for user in updated) == list(range(2, 12))


async def test_delete_removes_user_and_posts(server: Server, users: UserServiceAsyncStub, ada: User) -> None:
    """Its id is never reused."""
    await add_posts(server.database, [ada.id] * 3)
    assert await users.DeleteUser(DeleteUserRequest(id=ada.id)) == Empty()

    gone = await refusal(users.GetUser(GetUserRequest(id=ada.id)))
    assert gone.reason == "USER_NOT_FOUND"
    again = await users.CreateUser(CreateUserRequest(user=User(email=ada.email)))
    assert again.id > ada.id
    assert not (await users.GetUser(GetUserRequest(id=again.id, view=User.WITH_POSTS))).posts
