"""A deleted user leaves nothing in any table, whatever wrote it."""

import logging
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterable, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import make_url

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest, CreatePostRequest, UpdatePostRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkDeleteUsersRequest,
    BulkUpdateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
    UserKey,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.idempotency import fingerprint
from service.server import Server
from tests.support.traces import contains, files, traces, vacuum

BEFORE, EMAIL, NAME = "ada.byron@example.org", "countess@example.org", "Augusta Ada Lovelace"
PASSWORD, TITLE, CONTENT = "analytical engine", "Notes by the translator", "The engine weaves patterns"
PERSON = [word.encode() for word in (BEFORE, EMAIL, NAME, PASSWORD, TITLE, CONTENT)]
NEIGHBOUR = "charles@example.org"


async def delete_one(channel: grpc.aio.Channel, user: User) -> None:
    await UserServiceStub(channel).DeleteUser(DeleteUserRequest(id=user.id, request_id=str(uuid4())))


async def delete_in_bulk(channel: grpc.aio.Channel, user: User) -> None:
    options = BulkOptions(load_id="leavers")
    request = BulkDeleteUsersRequest(options=options, users=[UserKey(email=EMAIL)], finish=True)
    assert await count_failures(UserServiceStub(channel).BulkDeleteUsers(iter([request]))) == 0


# Each way to delete a user, given the channel and the user.
DELETIONS: dict[str, Callable[[grpc.aio.Channel, User], Awaitable[None]]] = {
    "DeleteUser": delete_one,
    "BulkDeleteUsers": delete_in_bulk,
}


async def count_failures(stream: AsyncIterable[Any]) -> int:
    return sum([message.ack.failed async for message in stream])


async def write_everywhere(channel: grpc.aio.Channel) -> tuple[User, list[bytes]]:
    """Write a user and posts by every RPC that stores something; return the user, and digests of requests."""
    users, posts = UserServiceStub(channel), PostServiceStub(channel)
    create = CreateUserRequest(
        user=User(email=BEFORE, full_name=NAME, password=PASSWORD), request_id=str(uuid4())
    )
    user = await users.CreateUser(create)
    update = UpdateUserRequest(user=User(id=user.id, email=EMAIL), request_id=str(uuid4()))
    await users.UpdateUser(update)
    await users.CreateUser(CreateUserRequest(user=User(email=NEIGHBOUR), request_id=str(uuid4())))
    create_post = CreatePostRequest(
        post=Post(author_id=user.id, title=TITLE, content=CONTENT), request_id=str(uuid4())
    )
    post = await posts.CreatePost(create_post)
    update_post = UpdatePostRequest(post=Post(id=post.id, title=TITLE + "!"), request_id=str(uuid4()))
    await posts.UpdatePost(update_post)

    # A taken e-mail, one that is none, and a name that is too long fail; the last row is a new user.
    rows = [User(email=EMAIL), User(email=f"{NAME}@"), User(email=f"b{EMAIL}", full_name=NAME * 20)]
    rows.append(User(email="grace@example.org"))
    load = BulkCreateUsersRequest(options=BulkOptions(load_id="users"), users=rows, finish=True)
    assert await count_failures(users.BulkCreateUsers(iter([load]))) == 3
    options = BulkOptions(load_id="names", update_mask=FieldMask(paths=["full_name"]))
    changes = [User(id=user.id, full_name=NAME), User(id=user.id, version=99, full_name=NAME)]
    change = BulkUpdateUsersRequest(options=options, users=changes, finish=True)
    assert await count_failures(users.BulkUpdateUsers(iter([change]))) == 1
    texts = [Post(author_email=EMAIL, title=TITLE, content=CONTENT), Post(author_email=BEFORE, title=TITLE)]
    load_posts = BulkCreatePostsRequest(options=BulkOptions(load_id="posts"), posts=texts, finish=True)
    assert await count_failures(posts.BulkCreatePosts(iter([load_posts]))) == 1

    await users.VerifyPassword(VerifyPasswordRequest(email=EMAIL, password=PASSWORD))
    await users.ListUsers(ListUsersRequest(filter=f'email = "{EMAIL}"', order_by="email"))
    return user, [fingerprint(request) for request in (create, update, create_post, update_post)]


@pytest.mark.parametrize("delete", DELETIONS.values(), ids=DELETIONS)
async def test_deleted_user_leaves_no_trace(
    server: Server,
    channel: grpc.aio.Channel,
    caplog: pytest.LogCaptureFixture,
    delete: Callable[[grpc.aio.Channel, User], Awaitable[None]],
) -> None:
    """In any column of any table, in the log, and on SQLite in its files, once they are vacuumed."""
    caplog.set_level(logging.DEBUG)
    user, digests = await write_everywhere(channel)
    needles = [*PERSON, *digests]
    written = {f"users.{column}" for column in ("email", "full_name")}
    written |= {f"posts.{column}" for column in ("title", "content")}
    written |= {"requests.answer", "requests.fingerprint"}
    assert await traces(server.database, needles) == written
    neighbours = {"users.email", "requests.answer"}

    await delete(channel, user)

    assert await traces(server.database, needles) == set()
    assert await traces(server.database, [NEIGHBOUR.encode()]) == neighbours
    assert not contains(repr([vars(record) for record in caplog.records]).encode(), needles)
    if server.database.is_sqlite:
        path = Path(make_url(server.settings.database_url).database or "")
        vacuum(path)
        assert contains(files(path), [NEIGHBOUR.encode()])
        assert not contains(files(path), needles)


async def test_page_token_contains_no_email(channel: grpc.aio.Channel) -> None:
    """Not in plain text; the next page begins after it all the same."""
    users = UserServiceStub(channel)
    for email in (BEFORE, EMAIL):
        await users.CreateUser(CreateUserRequest(user=User(email=email)))
    for order in ("email", "email desc"):
        request = ListUsersRequest(order_by=order, page_size=1)
        first = await users.ListUsers(request)
        request.page_token = first.next_page_token
        second = await users.ListUsers(request)

        decoded = urlsafe_b64decode(first.next_page_token + "==")
        assert not contains(decoded, [first.users[0].email.encode()])
        assert {first.users[0].email, second.users[0].email} == {BEFORE, EMAIL}
        assert second.next_page_token == ""
