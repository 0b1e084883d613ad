"""Loads of posts and deletes of their authors that cross all the time, on PostgreSQL."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import (
    BulkCreatePostsRequest,
    BulkDeletePostsRequest,
    BulkUpdatePostsRequest,
    PostKey,
)
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import BulkCreateUsersRequest, BulkDeleteUsersRequest, UserKey
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.server import serve

# `make test-crossing` runs for a minute.
SECONDS = float(os.environ.get("ROSTER_TEST_CROSSING", "4"))
USERS = 400
ROWS = 300
MESSAGES = 30
EXPECTED = {"AUTHOR_NOT_FOUND", "USER_NOT_FOUND", "POST_NOT_FOUND"}
EMAILS = [f"user{number}@example.org" for number in range(USERS)]


class Loads:
    """Streams that run until the time is over, and what they were answered."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.users, self.posts = UserServiceStub(channel), PostServiceStub(channel)
        self.counts: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.last_post = 1
        self.longest = 0.0  # seconds of a stream
        self._end = time.monotonic() + SECONDS

    async def repeat(self, load: Callable[[], Awaitable[None]]) -> None:
        """Run one load after the other."""
        while time.monotonic() < self._end:
            await load()

    async def create_users(self) -> None:
        rows = [User(email=email) for email in random.sample(EMAILS, ROWS)]
        await self._run(
            self.users.BulkCreateUsers,
            BulkCreateUsersRequest(options=BulkOptions(on_conflict=BulkOptions.SKIP), users=rows),
        )

    async def create_posts(self) -> None:
        # Batches of one stream wait for each other's commits, too.
        options = BulkOptions(return_ids=True)
        requests = [BulkCreatePostsRequest(options=options)]
        for _ in range(MESSAGES):
            rows = [Post(author_email=random.choice(EMAILS), title="Notes") for _ in range(ROWS // MESSAGES)]
            requests.append(BulkCreatePostsRequest(posts=rows))
        await self._run(self.posts.BulkCreatePosts, *requests)

    async def delete_users(self) -> None:
        keys = [UserKey(email=email) for email in random.sample(EMAILS, ROWS // 3)]
        await self._run(self.users.BulkDeleteUsers, BulkDeleteUsersRequest(users=keys))

    async def update_posts(self) -> None:
        rows = [Post(id=id, title="More notes") for id in self._some_posts()]
        options = BulkOptions(update_mask=FieldMask(paths=["title"]))
        await self._run(self.posts.BulkUpdatePosts, BulkUpdatePostsRequest(options=options, posts=rows))

    async def delete_posts(self) -> None:
        keys = [PostKey(id=id) for id in self._some_posts()[:50]]
        await self._run(self.posts.BulkDeletePosts, BulkDeletePostsRequest(posts=keys))

    def _some_posts(self) -> list[int]:
        newest = range(max(self.last_post - 5 * ROWS, 1), self.last_post + 1)
        return random.sample(newest, min(ROWS, len(newest)))

    async def _run(self, rpc: Any, *requests: Any) -> None:
        started = time.monotonic()
        async for event in rpc(iter(requests)):
            ack = event.ack
            self.counts.update(
                created=ack.created, updated=ack.updated, deleted=ack.deleted, deleted_posts=ack.deleted_posts
            )
            self.last_post = max([self.last_post, *ack.ids])
            if ack.HasField("error"):
                self.problems[f"{type(requests[0]).__name__}: {ack.error.message}"] += 1
            self.problems.update(failure.reason for failure in ack.failures if failure.reason not in EXPECTED)
        self.longest = max(self.longest, time.monotonic() - started)


@pytest.mark.timeout(SECONDS + 60)
async def test_crossing_loads_and_deletes_are_all_answered(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A row fails only because its user or post does not exist; no caller learns of a deadlock."""
    async with serve(postgresql_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        loads = Loads(channel)
        await loads.create_users()
        kinds = [loads.create_users, loads.create_posts, loads.delete_users, loads.update_posts]
        await asyncio.gather(
            *map(loads.repeat, [*kinds, loads.create_posts, loads.delete_users, loads.delete_posts])
        )

    deadlocks = sum("deadlock" in message for message in caplog.messages)
    print(f"{dict(loads.counts)}, {deadlocks} deadlocks, {loads.longest:.1f} s at most")  # noqa: T201 - for the long run
    assert loads.problems == {}
    assert min(loads.counts.values()) > 0
