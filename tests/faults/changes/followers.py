"""Followers: consumers that read the feed by both RPCs, are cut off, and continue from their last token."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import grpc
from google.rpc.error_details_pb2 import ErrorInfo

from roster.v1.changes_pb2 import Change, ListChangesRequest, WatchChangesRequest
from roster.v1.changes_pb2_grpc import ChangeServiceStub
from roster.v1.posts_pb2 import ExportPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.users_pb2 import ExportUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.faults.changes.mirror import TABLES, Mirror
from tests.support.errors import Refusal

PAGE_SIZES = (1, 7, 60, 300, 300, 1000, 1000)
MAX_RESPONSES = 12  # before a watch is cut
CUT_SECONDS = 0.1, 1.5  # without a response, after which a watch is cut
LOST = 0.15  # of the responses are received and not stored, as if the consumer had crashed
IDLE_SECONDS = 0.08  # between polls that bring nothing
CALL_SECONDS = 20
RESETS = ("TOKEN_EXPIRED", "FEED_RESET")  # after which a consumer exports again
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Stubs:
    """The services of one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.users, self.posts = UserServiceStub(channel), PostServiceStub(channel)
        self.changes = ChangeServiceStub(channel)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason of an error, nothing if it has none."""
    info = Refusal(error).detail(ErrorInfo)
    return str(info.reason) if info else ""


async def token_before(
    stubs: Stubs, entities: Sequence[Change.Entity.ValueType], export: Callable[[], Awaitable[str]]
) -> str:
    """Return a position of the feed before an export: that of the export if it has one."""
    response = await stubs.changes.ListChanges(ListChangesRequest(entities=entities), timeout=CALL_SECONDS)
    return await export() or response.token


class Follower:
    """A consumer with a mirror. `kinds` says how it reads: "list", "watch", and "export" to begin again."""

    # A mutant takes the token later.
    export_with_token = staticmethod(token_before)

    def __init__(
        self,
        servers: Sequence[Stubs],
        random: Random,
        entities: Sequence[Change.Entity.ValueType],
        kinds: Sequence[str],
    ) -> None:
        self.mirror = Mirror(TABLES[entity] for entity in entities)
        self.resets = 0
        # When calls began and ended after which nothing was left to read.
        self.complete_reads: list[tuple[float, float]] = []
        self.name = f"{'/'.join(kinds)} of {'/'.join(sorted(self.mirror.tables))}"
        self._servers = servers
        self._random = random
        self._entities = entities
        self._kinds = kinds
        self._token = ""

    async def run(self) -> None:
        """Follow the feed until the task is cancelled."""
        while True:
            stubs = self._random.choice(self._servers)
            try:
                if not self._token or self._is_to_begin_again():
                    await self._begin(stubs)
                elif self._random.choice([kind for kind in self._kinds if kind != "export"]) == "watch":
                    await self._watch(stubs)
                else:
                    await self._list(stubs)
            except grpc.aio.AioRpcError as error:
                await self._recover(error)

    def _is_to_begin_again(self) -> bool:
        return "export" in self._kinds and self._random.random() < 0.02

    async def _recover(self, error: grpc.aio.AioRpcError) -> None:
        if reason_of(error) in RESETS:
            self.resets += 1
            self._token = ""
        elif error.code() not in RETRIED:
            raise error
        await asyncio.sleep(IDLE_SECONDS)

    async def _begin(self, stubs: Stubs) -> None:
        """Begin with an export."""
        self.mirror.begin_again()

        async def export() -> str:
            size, tokens = self._random.choice([20, 100, 1000]), [""]
            if "users" in self.mirror.tables:
                request = ExportUsersRequest(batch_size=size)
                async for users in stubs.users.ExportUsers(request, timeout=CALL_SECONDS):
                    tokens.append(users.watch_token)
                    for user in users.users:
                        self.mirror.put_user(user)
            if "posts" in self.mirror.tables:
                of_posts = ExportPostsRequest(batch_size=size)
                async for posts in stubs.posts.ExportPosts(of_posts, timeout=CALL_SECONDS):
                    tokens.append(posts.watch_token)
                    for post in posts.posts:
                        self.mirror.put_post(post)
            return next(filter(None, tokens), "")

        self._token = ""
        self._token = await self.export_with_token(stubs, self._entities, export)

    async def _list(self, stubs: Stubs) -> None:
        for _ in range(self._random.randint(1, MAX_RESPONSES)):
            size, began = self._random.choice(PAGE_SIZES), time.monotonic()
            request = ListChangesRequest(entities=self._entities, token=self._token, page_size=size)
            response = await stubs.changes.ListChanges(request, timeout=CALL_SECONDS)
            assert len(response.changes) <= size
            if self._random.random() < LOST:
                return
            self.mirror.apply(response.changes)
            self._token = response.token
            if not response.has_more:
                self.complete_reads.append((began, time.monotonic()))
                await asyncio.sleep(IDLE_SECONDS * self._random.random())

    async def _watch(self, stubs: Stubs) -> None:
        request = WatchChangesRequest(entities=self._entities, token=self._token)
        call = stubs.changes.WatchChanges(request)
        try:
            # Most consumers wait for the first response, or they would not get on while the server is slow.
            seconds = CALL_SECONDS if self._random.random() > LOST else CUT_SECONDS[0]
            for _ in range(self._random.randint(1, MAX_RESPONSES)):
                async with asyncio.timeout(seconds):
                    response: Any = await call.read()
                seconds = self._random.uniform(*CUT_SECONDS)
                if response is grpc.aio.EOF:
                    raise AssertionError("a watch has ended without an error")
                if self._random.random() < LOST:
                    return
                self.mirror.apply(response.changes)
                self._token = response.token
        except TimeoutError:
            return
        finally:
            call.cancel()
