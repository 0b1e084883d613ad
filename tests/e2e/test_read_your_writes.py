"""A read with a token never misses the write that gave it, while the replica stops and goes at random."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from random import Random
from typing import Any
from uuid import uuid4

import grpc
import pytest

from roster.client import NotFound, channel
from roster.consistency import KEY
from roster.errors import RosterError
from roster.v1.posts_pb2 import (
    BatchGetPostsRequest,
    CreatePostRequest,
    DeletePostRequest,
    ExportPostsRequest,
    GetPostRequest,
    ListPostsRequest,
    UpdatePostRequest,
)
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.errors import Refusal
from tests.support.server import serve
from tests.support.standby import ReplicatedDatabase, Standby
from tests.support.tokens import counted

STEPS = 25
ACTORS = 3
LONGEST_PAUSE_SECONDS = 0.08


class Explicit:
    """Calls on a plain channel: a read has only the token of the write before it."""

    def __init__(self) -> None:
        self._token = ""

    async def write(self, call: Any) -> Any:
        """Return the response of a write, or the reason why it was refused."""
        response: Any = None
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            response = Refusal(error).reason
        metadata: Any = await call.trailing_metadata()
        self._token = dict(metadata)[KEY]
        return response

    async def read(self, method: Any, request: Any) -> Any:
        """Return the response of a read; None if there is no such row."""
        try:
            return await method(request, metadata=((KEY, self._token),))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise

    def export(self, method: Any, request: Any) -> Any:
        return method(request, metadata=((KEY, self._token),))


class Carried:
    """Calls on a channel of the client library, which carries the tokens."""

    async def write(self, call: Any) -> Any:
        try:
            return await call
        except RosterError as error:
            return error.reason

    async def read(self, method: Any, request: Any) -> Any:
        with suppress(NotFound):
            return await method(request)
        return None

    def export(self, method: Any, request: Any) -> Any:
        return method(request)


class Actor:
    """A caller who changes rows of its own, and knows how they must be: as the last answer said."""

    def __init__(
        self, name: str, connection: grpc.aio.Channel, calls: Explicit | Carried, random: Random
    ) -> None:
        self.name = name
        self.users = UserServiceStub(connection)
        self.posts = PostServiceStub(connection)
        self.calls = calls
        self.random = random
        self.rows: dict[int, User] = {}
        self.written: dict[int, Post] = {}
        self.deleted: list[int] = [10**9]

    async def run(self) -> None:
        await self.create_user()
        for _ in range(STEPS):
            await self.random.choice(WRITES)(self)
            for read in self.random.sample(READS, 3):
                await read(self)

    # Writes.

    async def create_user(self) -> None:
        user = User(email=f"{self.name}-{uuid4().hex}@example.org", full_name=self.name)
        request = CreateUserRequest(user=user, request_id=self.random.choice(["", str(uuid4())]))
        created = await self.calls.write(self.users.CreateUser(request))
        if request.request_id and self.random.random() < 0.5:
            assert await self.calls.write(self.users.CreateUser(request)) == created
        self.rows[created.id] = created

    async def update_user(self) -> None:
        changed = User(id=self.any_user().id, email=f"{self.name}-{uuid4().hex}@example.org")
        updated = await self.calls.write(self.users.UpdateUser(UpdateUserRequest(user=changed)))
        self.rows[updated.id] = updated

    async def delete_user(self) -> None:
        if len(self.rows) == 1:
            return
        id = self.any_user().id
        await self.calls.write(self.users.DeleteUser(DeleteUserRequest(id=id)))
        del self.rows[id]
        self.written = {key: post for key, post in self.written.items() if post.author_id != id}
        self.deleted.append(id)

    async def create_post(self) -> None:
        post = Post(author_id=self.any_user().id, title=self.name)
        created = await self.calls.write(self.posts.CreatePost(CreatePostRequest(post=post)))
        self.written[created.id] = created

    async def update_post(self) -> None:
        if self.written:
            changed = Post(id=self.any_post().id, content=uuid4().hex)
            updated = await self.calls.write(self.posts.UpdatePost(UpdatePostRequest(post=changed)))
            self.written[updated.id] = updated

    async def delete_post(self) -> None:
        if self.written:
            id = self.any_post().id
            await self.calls.write(self.posts.DeletePost(DeletePostRequest(id=id)))
            del self.written[id]

    async def fail_to_create(self) -> None:
        """The e-mail is taken: the caller reads who has it."""
        user = self.any_user()
        refused = await self.calls.write(
            self.users.CreateUser(CreateUserRequest(user=User(email=user.email)))
        )
        assert refused == "EMAIL_TAKEN"
        assert await self.calls.read(self.users.GetUser, GetUserRequest(email=user.email)) == user

    async def fail_to_update(self) -> None:
        """The version is another one: the caller reads it."""
        user = self.any_user()
        stale = User(id=user.id, full_name="?", version=user.version + 1)
        assert (
            await self.calls.write(self.users.UpdateUser(UpdateUserRequest(user=stale))) == "VERSION_MISMATCH"
        )
        assert await self.calls.read(self.users.GetUser, GetUserRequest(id=user.id)) == user

    async def fail_to_delete(self) -> None:
        request = DeleteUserRequest(id=self.deleted[-1])
        assert await self.calls.write(self.users.DeleteUser(request)) == "USER_NOT_FOUND"

    async def load_users(self) -> None:
        users = [User(email=f"{self.name}-{uuid4().hex}@example.org", full_name=self.name) for _ in range(3)]
        request = BulkCreateUsersRequest(users=users, finish=True)
        await self.calls.write(Stream(self.users.BulkCreateUsers(iter([request]))))
        for user in users:
            stored = await self.calls.read(self.users.GetUser, GetUserRequest(email=user.email))
            assert stored is not None
            self.rows[stored.id] = stored

    # Reads.

    async def get_user(self) -> None:
        user = self.any_user()
        request = self.random.choice([GetUserRequest(id=user.id), GetUserRequest(email=user.email)])
        assert await self.calls.read(self.users.GetUser, request) == user

    async def get_deleted_user(self) -> None:
        assert await self.calls.read(self.users.GetUser, GetUserRequest(id=self.deleted[-1])) is None

    async def get_user_with_posts(self) -> None:
        user = self.any_user()
        found = await self.calls.read(self.users.GetUser, GetUserRequest(id=user.id, view=User.WITH_POSTS))
        assert [(post.id, post.version) for post in found.posts] == self.newest_posts(user.id)
        found.ClearField("posts")
        assert found == user

    async def get_users(self) -> None:
        view = self.random.choice([User.BASIC, User.WITH_POSTS])
        request = BatchGetUsersRequest(ids=[*self.rows, *self.deleted], view=view)
        found = await self.calls.read(self.users.BatchGetUsers, request)
        assert {user.id: user.version for user in found.users} == versions(self.rows)

    async def list_users(self) -> None:
        request = ListUsersRequest(
            filter=f'full_name = "{self.name}"',
            order_by=self.random.choice(["", "email", "created_at desc"]),
            view=self.random.choice([User.BASIC, User.WITH_POSTS]),
            page_size=1000,
        )
        found = await self.calls.read(self.users.ListUsers, request)
        assert {user.id: user.version for user in found.users} == versions(self.rows)

    async def list_all_users(self) -> None:
        """Among those of the others, too."""
        found = await self.calls.read(self.users.ListUsers, ListUsersRequest(page_size=1000))
        mine = {user.id: user.version for user in found.users if user.full_name == self.name}
        assert mine == versions(self.rows)

    async def export_users(self) -> None:
        request = ExportUsersRequest(filter=f'full_name = "{self.name}"', batch_size=3)
        pages = [page async for page in self.calls.export(self.users.ExportUsers, request)]
        assert [user for page in pages for user in page.users] == [self.rows[id] for id in sorted(self.rows)]

    async def get_post(self) -> None:
        if self.written:
            post = self.any_post()
            assert await self.calls.read(self.posts.GetPost, GetPostRequest(id=post.id)) == post

    async def get_post_with_author(self) -> None:
        if self.written:
            post = self.any_post()
            request = GetPostRequest(id=post.id, view=Post.WITH_AUTHOR)
            found = await self.calls.read(self.posts.GetPost, request)
            assert (found.version, found.author) == (post.version, self.rows[post.author_id])

    async def get_posts(self) -> None:
        if self.written:
            found = await self.calls.read(self.posts.BatchGetPosts, BatchGetPostsRequest(ids=[*self.written]))
            assert {post.id: post.version for post in found.posts} == versions(self.written)

    async def list_posts(self) -> None:
        author = self.any_user().id
        found = await self.calls.read(
            self.posts.ListPosts, ListPostsRequest(author_id=author, page_size=1000)
        )
        mine = {id: post for id, post in self.written.items() if post.author_id == author}
        assert {post.id: post.version for post in found.posts} == versions(mine)

    async def export_posts(self) -> None:
        request = ExportPostsRequest(filter=f'title = "{self.name}"', batch_size=2)
        pages = [page async for page in self.calls.export(self.posts.ExportPosts, request)]
        assert [post for page in pages for post in page.posts] == [
            self.written[id] for id in sorted(self.written)
        ]

    def any_user(self) -> User:
        return self.random.choice([*self.rows.values()])

    def any_post(self) -> Post:
        return self.random.choice([*self.written.values()])

    def newest_posts(self, author: int) -> list[tuple[int, int]]:
        mine = [post for post in self.written.values() if post.author_id == author]
        return [(post.id, post.version) for post in sorted(mine, key=lambda post: -post.id)]


WRITES: list[Callable[[Actor], Awaitable[None]]] = [
    Actor.create_user,
    Actor.update_user,
    Actor.delete_user,
    Actor.create_post,
    Actor.create_post,
    Actor.update_post,
    Actor.delete_post,
    Actor.fail_to_create,
    Actor.fail_to_update,
    Actor.fail_to_delete,
    Actor.load_users,
]
READS: list[Callable[[Actor], Awaitable[None]]] = [
    Actor.get_user,
    Actor.get_deleted_user,
    Actor.get_user_with_posts,
    Actor.get_users,
    Actor.list_users,
    Actor.list_all_users,
    Actor.export_users,
    Actor.get_post,
    Actor.get_post_with_author,
    Actor.get_posts,
    Actor.list_posts,
    Actor.export_posts,
]


def versions(rows: dict[int, Any]) -> dict[int, int]:
    return {id: row.version for id, row in rows.items()}


class Stream:
    """A bulk stream as a call that is awaited."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.trailing_metadata = call.trailing_metadata

    def __await__(self) -> Any:
        return self._read().__await__()

    async def _read(self) -> list[Any]:
        return [response async for response in self._call]


async def stop_and_go(standby: Standby, random: Random) -> None:
    """Pause and resume the replay at random moments."""
    while True:
        await standby.pause_replay()
        await asyncio.sleep(random.uniform(0, LONGEST_PAUSE_SECONDS))
        await standby.resume_replay()
        await asyncio.sleep(random.uniform(0, LONGEST_PAUSE_SECONDS))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [Explicit, Carried])
async def test_no_read_misses_the_write_whose_token_it_has(
    kind: type[Explicit | Carried], seed: int, replicated: ReplicatedDatabase
) -> None:
    """On any RPC that reads, also after writes that were refused; both servers have answered reads."""
    random = Random(seed)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serve(replicated.url, replica_url=replicated.replica_url))
        chaos = asyncio.create_task(stop_and_go(replicated.standby, random))
        stack.callback(chaos.cancel)
        actors = []
        for number in range(ACTORS):
            connect = channel if kind is Carried else grpc.aio.insecure_channel
            connection = await stack.enter_async_context(connect(server.address))
            actors.append(Actor(f"actor{number}", connection, kind(), random))
        with counted() as counts:
            await asyncio.gather(*(actor.run() for actor in actors))
        assert not chaos.done()
    assert counts["source=replica"] > STEPS
    assert counts["fallback=behind"] > 0  # how many depends on how much time the replica has
