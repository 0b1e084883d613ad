"""Writes with a `request_id`: applied once, with the same response each time."""

import asyncio
from datetime import timedelta
from uuid import uuid4

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from roster.v1.posts_pb2 import CreatePostRequest, DeletePostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    CreateUserRequest,
    DeleteUserRequest,
    GetUserRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server, utc_now
from tests.support.errors import refusal
from tests.support.server import serve
from tests.support.users import list_users

HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQxMjM0NTY$dGhpcyBpcyBub3QgYSBoYXNoIGF0IGFsbA"


@pytest.fixture
async def ada(users: UserServiceAsyncStub) -> User:
    """A user with every field set."""
    user = User(email="ada@example.org", full_name="Ada", is_active=True)
    return await users.CreateUser(CreateUserRequest(user=user))


async def test_repeated_create_gets_first_response(users: UserServiceAsyncStub) -> None:
    """Even after an update of the created user."""
    request = CreateUserRequest(user=User(email="ada@example.org"), request_id=str(uuid4()))
    created = await users.CreateUser(request)
    await users.UpdateUser(UpdateUserRequest(user=User(id=created.id, full_name="Ada")))

    assert await users.CreateUser(request) == created
    request.request_id = request.request_id.upper()
    assert await users.CreateUser(request) == created
    assert [user.id for user in await list_users(users)] == [created.id]


async def test_repeated_update_gets_first_response(users: UserServiceAsyncStub, ada: User) -> None:
    """Although the expected version is no longer current."""
    request = UpdateUserRequest(
        user=User(id=ada.id, full_name="Countess", version=1), request_id=str(uuid4())
    )
    updated = await users.UpdateUser(request)

    assert await users.UpdateUser(request) == updated
    assert (await users.GetUser(GetUserRequest(id=ada.id))).version == 2


async def test_repeated_delete_gets_first_response(users: UserServiceAsyncStub, ada: User) -> None:
    """Without a `request_id` the user is not found."""
    request = DeleteUserRequest(id=ada.id, request_id=str(uuid4()))

    assert [await users.DeleteUser(request), await users.DeleteUser(request)] == [Empty(), Empty()]
    request.ClearField("request_id")
    assert (await refusal(users.DeleteUser(request))).reason == "USER_NOT_FOUND"


async def test_repeated_write_of_a_deleted_row_is_not_found(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ada: User
) -> None:
    """Whatever its body, and nothing is created. The posts of a deleted user are deleted, too."""
    create = CreateUserRequest(user=User(email="alan@example.org"), request_id=str(uuid4()))
    alan = await users.CreateUser(create)
    update = UpdateUserRequest(user=User(id=alan.id, full_name="Alan"), request_id=str(uuid4()))
    await users.UpdateUser(update)
    post = CreatePostRequest(post=Post(author_id=alan.id, title="Notes"), request_id=str(uuid4()))
    await posts.CreatePost(post)
    kept = CreatePostRequest(post=Post(author_id=ada.id, title="Notes"), request_id=str(uuid4()))
    remaining = await posts.CreatePost(kept)
    gone = CreatePostRequest(post=kept.post, request_id=str(uuid4()))
    await posts.DeletePost(DeletePostRequest(id=(await posts.CreatePost(gone)).id))
    await users.DeleteUser(DeleteUserRequest(id=alan.id))

    for body in (create.user, User(email="grace@example.org")):
        create.user.CopyFrom(body)
        refused = await refusal(users.CreateUser(create))
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    assert (await refusal(users.UpdateUser(update))).reason == "USER_NOT_FOUND"
    for request in (post, gone):
        assert (await refusal(posts.CreatePost(request))).reason == "POST_NOT_FOUND"
    assert await posts.CreatePost(kept) == remaining
    assert await list_users(users) == [ada]


async def test_request_id_with_another_body_is_refused(users: UserServiceAsyncStub) -> None:
    """Nothing is written."""
    request_id = str(uuid4())
    await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org"), request_id=request_id))
    another = CreateUserRequest(user=User(email="alan@example.org"), request_id=request_id)

    refused = await refusal(users.CreateUser(another))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert [user.email for user in await list_users(users)] == ["ada@example.org"]


async def test_request_id_is_scoped_to_its_method(users: UserServiceAsyncStub) -> None:
    """A create, an update and a delete may share it."""
    request_id = str(uuid4())
    user = User(email="ada@example.org")
    user.id = (await users.CreateUser(CreateUserRequest(user=user, request_id=request_id))).id

    assert (await users.UpdateUser(UpdateUserRequest(user=user, request_id=request_id))).version == 2
    assert await users.DeleteUser(DeleteUserRequest(id=user.id, request_id=request_id)) == Empty()


async def test_concurrent_calls_with_one_request_id_write_one_row(users: UserServiceAsyncStub) -> None:
    """All get the response of the call that wrote it."""
    request = CreateUserRequest(user=User(email="ada@example.org"), request_id=str(uuid4()))
    answers = await asyncio.gather(*(users.CreateUser(request) for _ in range(5)))

    assert answers == [answers[0]] * 5
    assert await list_users(users) == [answers[0]]


async def test_failed_call_is_not_stored(users: UserServiceAsyncStub, ada: User) -> None:
    """The same request succeeds once the cause is gone."""
    request = CreateUserRequest(user=User(email=ada.email), request_id=str(uuid4()))
    assert (await refusal(users.CreateUser(request))).reason == "EMAIL_TAKEN"
    await users.DeleteUser(DeleteUserRequest(id=ada.id))

    assert (await users.CreateUser(request)).email == ada.email


async def test_passwords_are_not_compared(users: UserServiceAsyncStub) -> None:
    """All other fields are, including a hash."""
    request = CreateUserRequest(user=User(email="ada@example.org", password="one"), request_id=str(uuid4()))
    created = await users.CreateUser(request)

    request.user.password = "two"
    assert await users.CreateUser(request) == created
    request.user.ClearField("password")
    request.user.hashed_password = HASH
    assert (await refusal(users.CreateUser(request))).reason == "REQUEST_ID_REUSED"


async def test_request_id_is_new_after_a_day(server: Server, users: UserServiceAsyncStub) -> None:
    """A server whose clock is a day ahead deletes the response when it starts."""
    request = CreateUserRequest(user=User(email="ada@example.org"), request_id=str(uuid4()))
    created = await users.CreateUser(request)

    async def repeat() -> None:
        while True:
            assert await users.CreateUser(request) == created

    async with serve(server.settings.database_url, clock=lambda: utc_now() + timedelta(hours=24)):
        refused = await refusal(repeat())
    assert refused.reason == "EMAIL_TAKEN"
