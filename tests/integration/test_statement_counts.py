"""The number of statements of each RPC, which does not depend on the number of rows."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from sqlalchemy import Engine, event

from roster.v1 import posts_pb2, users_pb2
from roster.v1.bulk_pb2 import BulkOptions, BulkWriteResponse
from roster.v1.posts_pb2 import (
    BatchGetPostsRequest,
    BulkCreatePostsRequest,
    BulkDeletePostsRequest,
    BulkUpdatePostsRequest,
    CountPostsRequest,
    CreatePostRequest,
    DeletePostRequest,
    ExportPostsRequest,
    GetPostRequest,
    ListPostsRequest,
    PostKey,
    UpdatePostRequest,
)
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub, PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    BulkDeleteUsersRequest,
    BulkUpdateUsersRequest,
    CountUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
    UserKey,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db.bulk.sqlite import ROWS_AT_ONCE
from service.server import Server
from tests.support.rows import add_posts, add_users
from tests.support.server import serve
from tests.support.statements import CHORES, Fetch, Statement, intercept_fetches

# Transaction control and, as PostgreSQL's COPY is not seen, the clock that SQLite's bulk writer reads.
NOT_COUNTED = ("BEGIN", "SAVEPOINT", "SELECT (strftime(")


@dataclass
class Api:
    """A server with a number of users, each with a post; the first user has as many more.

    As many users, each with a post, are there to be deleted.
    """

    users: UserServiceAsyncStub
    posts: PostServiceAsyncStub
    user_ids: list[int]
    leaver_ids: list[int]
    post_ids: list[int]
    rows: int


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server of the test."""
    async with serve(database_url) as server:
        yield server


@pytest.fixture(params=[1, 1000])
async def api(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Api]:
    """A server with one row of each kind, or with a thousand."""
    rows = request.param
    ids = await add_users(server.database, 2 * rows)
    user_ids, leaver_ids = ids[:rows], ids[rows:]
    post_ids = await add_posts(server.database, user_ids + user_ids[:1] * rows)
    await add_posts(server.database, leaver_ids)
    async with grpc.aio.insecure_channel(server.address) as channel:
        users, posts = UserServiceStub(channel), PostServiceStub(channel)
        yield Api(users, posts, user_ids, leaver_ids, post_ids, rows)


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """The statements sent, through SQLAlchemy or by the driver."""
    executed: list[str] = []

    async def note_fetch(statement: Statement, fetch: Fetch) -> Any:
        executed.append(statement.sql)
        return await fetch()

    full_part = ""  # SQLite's writer sends the rows of a statement in parts

    def note(connection: Any, cursor: Any, statement: str, rows: Any, _: Any, executemany: bool) -> None:
        nonlocal full_part
        if CHORES.match(statement):
            return  # it may come between two parts
        if not (statement.startswith(NOT_COUNTED) or statement == full_part):
            executed.append(statement)
        full_part = statement if executemany and len(rows) == ROWS_AT_ONCE else ""

    event.listen(Engine, "before_cursor_execute", note)
    with intercept_fetches(note_fetch):
        yield executed
    event.remove(Engine, "before_cursor_execute", note)


unique = count()


def new_user() -> User:
    return User(email=f"new{next(unique)}@example.org")


async def repeated(api: Api) -> None:
    request = CreateUserRequest(user=new_user(), request_id=str(uuid4()))
    for _ in range(2):
        await api.users.CreateUser(request)


def ensure_user(api: Api, **options: Any) -> Awaitable[User]:
    return api.users.CreateUser(CreateUserRequest(user=User(email="user0@example.org"), **options))


async def read(stream: AsyncIterable[Message]) -> None:
    """Read a stream to its end; no row of a bulk stream may fail."""
    async for message in stream:
        if isinstance(message, BulkWriteResponse):
            assert (message.ack.failed, message.ack.error.code) == (0, 0)


def create_users(api: Api) -> Awaitable[None]:
    rows = [new_user() for _ in range(api.rows)]
    return read(api.users.BulkCreateUsers(iter([BulkCreateUsersRequest(users=rows, finish=True)])))


def amend_users(api: Api) -> Awaitable[None]:
    rows = [User(email=f"user{number}@example.org", full_name="Ada") for number in range(api.rows)]
    options = BulkOptions(on_conflict=BulkOptions.UPDATE, update_mask=FieldMask(paths=["full_name"]))
    request = BulkCreateUsersRequest(users=rows, options=options, finish=True)
    return read(api.users.BulkCreateUsers(iter([request])))


def update_users(api: Api, field: str, value: str) -> Awaitable[None]:
    rows = [User(id=id, **{field: value.format(id)}) for id in api.user_ids]  # type: ignore[arg-type]
    options = BulkOptions(update_mask=FieldMask(paths=[field]))
    request = BulkUpdateUsersRequest(users=rows, options=options, finish=True)
    return read(api.users.BulkUpdateUsers(iter([request])))


def create_posts(api: Api, *authors: Post) -> Awaitable[None]:
    rows = [Post(title="New", author_id=post.author_id, author_email=post.author_email) for post in authors]
    return read(api.posts.BulkCreatePosts(iter([BulkCreatePostsRequest(posts=rows, finish=True)])))


def update_posts(api: Api) -> Awaitable[None]:
    rows = [Post(id=id, title="Changed") for id in api.post_ids]
    options = BulkOptions(update_mask=FieldMask(paths=["title"]))
    request = BulkUpdatePostsRequest(posts=rows, options=options, finish=True)
    return read(api.posts.BulkUpdatePosts(iter([request])))


def delete_posts(api: Api) -> Awaitable[None]:
    keys = [PostKey(id=id) for id in api.post_ids[api.rows :]]
    return read(api.posts.BulkDeletePosts(iter([BulkDeletePostsRequest(posts=keys, finish=True)])))


def delete_users(api: Api) -> Awaitable[None]:
    keys = [UserKey(id=id) for id in api.leaver_ids]
    return read(api.users.BulkDeleteUsers(iter([BulkDeleteUsersRequest(users=keys, finish=True)])))


# PostgreSQL's new rows go by COPY, which is not seen here; a LOCK TABLE comes before.
# How many statements each takes, whatever the number of rows; run in this order.
CALLS: dict[str, tuple[int, Callable[[Api], Awaitable[Any]]]] = {
    "GetUser": (1, lambda api: api.users.GetUser(GetUserRequest(id=api.user_ids[0]))),
    "GetUser WITH_POSTS": (
        2,
        lambda api: api.users.GetUser(GetUserRequest(id=api.user_ids[0], view=User.WITH_POSTS)),
    ),
    "BatchGetUsers": (1, lambda api: api.users.BatchGetUsers(BatchGetUsersRequest(ids=api.user_ids))),
    "BatchGetUsers WITH_POSTS": (
        2,
        lambda api: api.users.BatchGetUsers(BatchGetUsersRequest(ids=api.user_ids, view=User.WITH_POSTS)),
    ),
    "ListUsers": (1, lambda api: api.users.ListUsers(ListUsersRequest(page_size=1000))),
    "ListUsers WITH_POSTS": (
        2,
        lambda api: api.users.ListUsers(ListUsersRequest(page_size=1000, view=User.WITH_POSTS)),
    ),
    "CountUsers": (1, lambda api: api.users.CountUsers(CountUsersRequest())),
    "ExportUsers": (
        2,  # and the token
        lambda api: read(api.users.ExportUsers(ExportUsersRequest(filter=f"id <= {api.rows}"))),
    ),
    "VerifyPassword": (
        1,
        lambda api: api.users.VerifyPassword(VerifyPasswordRequest(id=api.user_ids[0], password="x")),
    ),
    "GetPost": (1, lambda api: api.posts.GetPost(GetPostRequest(id=api.post_ids[0]))),
    "GetPost WITH_AUTHOR": (
        1,
        lambda api: api.posts.GetPost(GetPostRequest(id=api.post_ids[0], view=Post.WITH_AUTHOR)),
    ),
    "BatchGetPosts": (
        1,
        lambda api: api.posts.BatchGetPosts(BatchGetPostsRequest(ids=api.post_ids[:1000])),
    ),
    "BatchGetPosts WITH_AUTHOR": (
        1,
        lambda api: api.posts.BatchGetPosts(
            BatchGetPostsRequest(ids=api.post_ids[:1000], view=Post.WITH_AUTHOR)
        ),
    ),
    "ListPosts": (1, lambda api: api.posts.ListPosts(ListPostsRequest(page_size=1000))),
    "ListPosts WITH_AUTHOR": (
        1,
        lambda api: api.posts.ListPosts(ListPostsRequest(page_size=1000, view=Post.WITH_AUTHOR)),
    ),
    "ListPosts of one author": (
        1,
        lambda api: api.posts.ListPosts(ListPostsRequest(page_size=1000, author_id=api.user_ids[0])),
    ),
    "CountPosts": (1, lambda api: api.posts.CountPosts(CountPostsRequest(author_id=api.user_ids[0]))),
    "ExportPosts": (
        2,  # and the token
        lambda api: read(api.posts.ExportPosts(ExportPostsRequest(filter=f"id <= {api.rows}"))),
    ),
    "CreateUser": (1, lambda api: api.users.CreateUser(CreateUserRequest(user=new_user()))),
    # Insert or find that the e-mail is taken, then lock or update.
    "CreateUser SKIP": (2, lambda api: ensure_user(api, on_conflict=BulkOptions.SKIP)),
    "CreateUser UPDATE": (
        2,
        lambda api: ensure_user(
            api, on_conflict=BulkOptions.UPDATE, update_mask=FieldMask(paths=["full_name"])
        ),
    ),
    "CreateUser, a dry run": (
        1,
        lambda api: api.users.CreateUser(CreateUserRequest(user=new_user(), validate_only=True)),
    ),
    # Claim, insert, keep; claim, read.
    "CreateUser, repeated": (5, repeated),
    "UpdateUser": (
        1,
        lambda api: api.users.UpdateUser(UpdateUserRequest(user=User(id=api.user_ids[0], full_name="Ada"))),
    ),
    "UpdateUser, the password": (
        1,
        lambda api: api.users.UpdateUser(
            UpdateUserRequest(user=User(id=api.user_ids[0], password="correct"))
        ),
    ),
    # The hash, then the user.
    "VerifyPassword, the right one": (
        2,
        lambda api: api.users.VerifyPassword(VerifyPasswordRequest(id=api.user_ids[0], password="correct")),
    ),
    "UpdateUser, the e-mail": (
        2,
        lambda api: api.users.UpdateUser(
            UpdateUserRequest(user=User(id=api.user_ids[0], email="user0@example.org"))
        ),
    ),
    "CreatePost": (
        1,
        lambda api: api.posts.CreatePost(
            CreatePostRequest(post=Post(author_id=api.user_ids[0], title="New"))
        ),
    ),
    "UpdatePost": (
        1,
        lambda api: api.posts.UpdatePost(UpdatePostRequest(post=Post(id=api.post_ids[0], title="New"))),
    ),
    "BulkCreateUsers": (2, create_users),
    "BulkCreateUsers UPDATE": (2, amend_users),
    "BulkUpdateUsers": (1, lambda api: update_users(api, "full_name", "Ada")),
    "BulkUpdateUsers, the e-mail": (3, lambda api: update_users(api, "email", "moved{}@example.org")),
    "BulkCreatePosts": (3, lambda api: create_posts(api, *(Post(author_id=id) for id in api.user_ids))),
    "BulkCreatePosts, by e-mail": (
        3,
        lambda api: create_posts(api, *(Post(author_email=f"moved{id}@example.org") for id in api.user_ids)),
    ),
    "BulkUpdatePosts": (1, update_posts),
    # Lock, erase the answers, delete; for users also: lock the posts, count, erase, delete, find no others.
    "BulkDeletePosts": (3, delete_posts),
    "BulkDeleteUsers": (8, delete_users),
    # Not the delete of a user with any number of posts, rolled back.
    "DeleteUser, a dry run": (
        1,
        lambda api: api.users.DeleteUser(DeleteUserRequest(id=api.user_ids[0], validate_only=True)),
    ),
    # Lock, erase the answers, delete; the same for the posts of a user, which are deleted with it.
    "DeletePost": (3, lambda api: api.posts.DeletePost(DeletePostRequest(id=api.post_ids[0]))),
    "DeleteUser": (5, lambda api: api.users.DeleteUser(DeleteUserRequest(id=api.user_ids[0]))),
}


def test_every_rpc_is_counted() -> None:
    """The table has all RPCs of the two services."""
    services = [
        users_pb2.DESCRIPTOR.services_by_name["UserService"],
        posts_pb2.DESCRIPTOR.services_by_name["PostService"],
    ]
    names = {method.name for service in services for method in service.methods}
    assert {name.replace(",", " ").split()[0] for name in CALLS} == names


async def test_a_call_takes_as_many_statements_for_a_thousand_rows_as_for_one(
    api: Api, statements: list[str]
) -> None:
    """As in the table, without transaction control; a bulk message is one call."""
    counted = {}
    await read(api.users.ExportUsers(ExportUsersRequest()))  # the first token of a feed writes its identity
    for name, (_, call) in CALLS.items():
        statements.clear()
        await call(api)
        counted[name] = len(statements)
    assert counted == {name: number for name, (number, _) in CALLS.items()}
