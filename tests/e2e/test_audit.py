"""The audit log: one line for each write, with who did what to which row."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import orjson
import pytest

from roster.v1.bulk_pb2 import AbortBulkLoadRequest, BulkOptions
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.posts_pb2 import CreatePostRequest, DeletePostRequest, UpdatePostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    GetUserRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.interceptors.audit import TARGETS
from service.logs import Json, Text
from service.server import Server
from service.users.repository import UserRepository
from tests.support.errors import refusal


def audited(log: pytest.LogCaptureFixture) -> list[tuple[Any, ...]]:
    """The lines of the audit log; ROSTER_LOG_LEVEL is WARNING."""
    fields = ("method", "target", "counts", "outcome")
    entries = [orjson.loads(Json().format(line)) for line in log.records if line.name == "roster.audit"]
    assert {line["caller"] for line in entries} == {"anonymous"}
    return [tuple(line[name] for name in fields) for line in entries]


def test_audits_every_rpc_that_writes() -> None:
    """Each entry says where the request has the id of its target."""
    assert TARGETS == {
        "/roster.v1.UserService/CreateUser": "",
        "/roster.v1.UserService/UpdateUser": "user.id",
        "/roster.v1.UserService/DeleteUser": "id",
        "/roster.v1.UserService/BulkCreateUsers": "",
        "/roster.v1.UserService/BulkUpdateUsers": "",
        "/roster.v1.UserService/BulkDeleteUsers": "",
        "/roster.v1.PostService/CreatePost": "",
        "/roster.v1.PostService/UpdatePost": "post.id",
        "/roster.v1.PostService/DeletePost": "id",
        "/roster.v1.PostService/BulkCreatePosts": "",
        "/roster.v1.PostService/BulkUpdatePosts": "",
        "/roster.v1.PostService/BulkDeletePosts": "",
        "/roster.v1.BulkService/AbortBulkLoad": "load_id",
    }


async def test_write_is_one_line(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the id of the row and the outcome; reads are not logged."""
    ada = await users.CreateUser(CreateUserRequest(user=User(id=4711, email="ada@example.org")))
    post = await posts.CreatePost(CreatePostRequest(post=Post(author_id=ada.id, title="Notes")))
    await users.GetUser(GetUserRequest(id=ada.id))
    await posts.UpdatePost(UpdatePostRequest(post=Post(id=post.id, title="More")))
    await refusal(users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, version=7, is_active=False))))
    await refusal(users.CreateUser(CreateUserRequest(user=User(email="ada@example.org"))))
    await posts.DeletePost(DeletePostRequest(id=post.id))
    await users.DeleteUser(DeleteUserRequest(id=ada.id))

    user, of_post = "/roster.v1.UserService/", "/roster.v1.PostService/"
    assert audited(caplog) == [
        (f"{user}CreateUser", ada.id, {}, "OK"),
        (f"{of_post}CreatePost", post.id, {}, "OK"),
        (f"{of_post}UpdatePost", post.id, {}, "OK"),
        (f"{user}UpdateUser", ada.id, {}, "VERSION_MISMATCH"),
        (f"{user}CreateUser", "", {}, "EMAIL_TAKEN"),
        (f"{of_post}DeletePost", post.id, {}, "OK"),
        (f"{user}DeleteUser", ada.id, {}, "OK"),
    ]


async def test_line_says_everything_once(
    users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    """In text, the fields follow the message."""
    ada = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))

    [record] = [line for line in caplog.records if line.name == "roster.audit"]
    line = Text("%(levelname)s %(name)s: %(message)s").format(record)
    assert line.startswith("INFO roster.audit: write ")
    assert line.endswith(
        f'caller=anonymous method=/roster.v1.UserService/CreateUser target={ada.id} owner="" counts={{}} '
        "outcome=OK effect=created dry_run=false"
    )


async def test_bulk_stream_is_one_line(
    channel: grpc.aio.Channel, users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    """It is written at the end, with the load's name and the counts of new rows."""

    async def messages(*sizes: int) -> AsyncIterator[BulkCreateUsersRequest]:
        options = BulkOptions(load_id="staff, two lines", on_conflict=BulkOptions.SKIP)
        offset = 0
        for size in sizes:
            rows = [User(email=f"user{offset + row}@example.org") for row in range(size)]
            yield BulkCreateUsersRequest(options=None if offset else options, offset=offset, users=rows)
            offset += size

    await users.CreateUser(CreateUserRequest(user=User(email="user1@example.org")))
    for sizes in ((2, 1), (2, 1, 4)):
        async for _ in users.BulkCreateUsers(messages(*sizes)):
            pass
    await BulkServiceStub(channel).AbortBulkLoad(AbortBulkLoadRequest(load_id="staff, two lines"))

    method = "/roster.v1.UserService/BulkCreateUsers"
    first = {"created": 2, "updated": 0, "skipped": 1, "failed": 0, "deleted": 0, "deleted_posts": 0}
    then = {"created": 4, "updated": 0, "skipped": 0, "failed": 0, "deleted": 0, "deleted_posts": 0}
    assert audited(caplog)[1:] == [
        (method, "staff, two lines", first, "OK"),
        (method, "staff, two lines", then, "OK"),
        ("/roster.v1.BulkService/AbortBulkLoad", "staff, two lines", {}, "OK"),
    ]
    assert not [line for line in caplog.records if "\n" in line.getMessage()]


async def test_failed_write_is_one_line(
    users: UserServiceAsyncStub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is INTERNAL, and it has nothing of the exception."""

    async def broken(*_: object) -> None:
        raise ValueError("xyzzy")

    monkeypatch.setattr(UserRepository, "create", broken)
    await refusal(users.CreateUser(CreateUserRequest(user=User(email="ada@example.org"))))

    assert audited(caplog) == [("/roster.v1.UserService/CreateUser", "", {}, "INTERNAL")]
    assert [line for line in caplog.messages if "xyzzy" in line] == []


async def test_cancelled_write_is_one_line(
    server: Server,
    users: UserServiceAsyncStub,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream counts the rows that were committed."""
    begun = asyncio.Event()

    async def waiting(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(UserRepository, "create", waiting)
    stream: Any = users.BulkCreateUsers()
    await stream.write(BulkCreateUsersRequest(users=[User(email="alan@example.org")]))
    assert (await stream.read()).HasField("opened")
    assert (await stream.read()).ack.created == 1
    call = users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
    await begun.wait()
    call.cancel()
    stream.cancel()
    await server.drain.wait(60)

    counts = {"created": 1, "updated": 0, "skipped": 0, "failed": 0, "deleted": 0, "deleted_posts": 0}
    assert sorted(audited(caplog), key=str) == [
        ("/roster.v1.UserService/BulkCreateUsers", "", counts, "CANCELLED"),
        ("/roster.v1.UserService/CreateUser", "", {}, "CANCELLED"),
    ]
