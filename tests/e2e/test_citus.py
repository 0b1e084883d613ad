"""Roster on a Citus cluster: writes that several nodes commit, and nodes that fail between them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import make_url

from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.posts_pb2 import (
    BulkCreatePostsRequest,
    BulkUpdatePostsRequest,
    CreatePostRequest,
    UpdatePostRequest,
)
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub, PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import CreateUserRequest, DeleteUserRequest, UpdateUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.citus import CitusCluster
from tests.support.errors import Refusal, refusal
from tests.support.load_stream import load_once
from tests.support.postgres import Postgres
from tests.support.rival import rival, until
from tests.support.server import serve

LOST_WORKER = ("DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN")
POSTS = 200  # both workers have some of them
# Citus writes one for each worker that prepares its part of a transaction.
PREPARED = "SELECT count(*) FROM pg_dist_transaction"
TERMINATE_WAITING = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_locks WHERE NOT granted"
TERMINATE = """
    SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'citus_internal%'
"""
# The first transaction that writes a post loses its worker when it prepares or commits.
FAIL_ONCE = """
    SET citus.enable_ddl_propagation TO off;
    SET citus.override_table_visibility TO off;
    CREATE SEQUENCE attempts;
    CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('attempts') = 1 THEN
            PERFORM pg_terminate_backend(pg_backend_pid());
        END IF;
        RETURN NULL;
    END $$;
    DO $$
    DECLARE
        shard regclass;
    BEGIN
        FOR shard IN SELECT oid FROM pg_class WHERE relname ~ '^posts_[0-9]+$' AND relkind = 'r' LOOP
            EXECUTE format(
                'CREATE CONSTRAINT TRIGGER fail_once AFTER INSERT OR UPDATE ON %s '
                'DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail_once()', shard
            );
        END LOOP;
    END $$;
"""


@pytest.fixture
async def url(citus_cluster: CitusCluster, postgresql_template: str) -> AsyncIterator[str]:
    """A database of the test's own: tests change the workers' part of it."""
    async with citus_cluster.database(postgresql_template) as url:
        yield url


@pytest.fixture
async def server(url: str) -> AsyncIterator[Server]:
    """A server of the test."""
    async with serve(url) as server:
        yield server


@pytest.fixture
async def nodes(citus_cluster: CitusCluster, url: str) -> list[Postgres]:
    """The test's database on each node, the coordinator's first."""
    return await citus_cluster.nodes(make_url(url).database)


@pytest.fixture
async def ada(users: UserServiceAsyncStub) -> User:
    """An author."""
    return await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))


async def create_posts(posts: PostServiceAsyncStub, author: User, count: int = POSTS) -> list[int]:
    """Create posts in one message, and return their ids."""
    rows = [Post(author_id=author.id, title=f"Post {number}") for number in range(count)]
    request = BulkCreatePostsRequest(options=BulkOptions(return_ids=True), posts=rows, finish=True)
    return list((await load_once(posts.BulkCreatePosts, request)).ids)


async def repeat(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a call while a lost worker is the reason of its error; return its answer."""

    async def answer() -> Any:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if Refusal(error).reason not in LOST_WORKER:
                raise
            return None

    return await until(answer)


async def count_posts(nodes: list[Postgres]) -> int:
    return int(await nodes[0].fetch("SELECT count(*) FROM posts"))


async def test_answer_and_post_are_prepared_before_they_are_committed(
    posts: PostServiceAsyncStub, ada: User, nodes: list[Postgres]
) -> None:
    """The answer is on the coordinator, and the post on a worker."""
    before = await nodes[0].fetch(PREPARED)
    create = CreatePostRequest(post=Post(author_id=ada.id, title="Notes"), request_id=str(uuid4()))
    post = await posts.CreatePost(create)

    assert await nodes[0].fetch(PREPARED) == before + 1
    assert await posts.CreatePost(create) == post


@pytest.mark.parametrize("request_id", [str(uuid4()), ""], ids=["two-phase", "one-phase"])
async def test_worker_lost_in_the_commit_leaves_the_outcome_unknown(
    posts: PostServiceAsyncStub, ada: User, nodes: list[Postgres], request_id: str
) -> None:
    """With a `request_id`, the call can be repeated, and happens once."""
    for worker in nodes[1:]:
        await worker.execute(FAIL_ONCE)
    create = CreatePostRequest(post=Post(author_id=ada.id, title="Notes"), request_id=request_id)

    assert (await refusal(posts.CreatePost(create))).reason == "OUTCOME_UNKNOWN"
    assert await count_posts(nodes) == 0
    post = await repeat(lambda: posts.CreatePost(create))
    assert await count_posts(nodes) == 1
    if request_id:
        assert await posts.CreatePost(create) == post
        assert await count_posts(nodes) == 1


async def test_restarted_workers_are_unavailable_and_come_back(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ada: User, nodes: list[Postgres]
) -> None:
    """The connections that Citus keeps to them are lost: calls can be repeated until they succeed."""
    [id, *_] = await create_posts(posts, ada)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, full_name="Ada"))),
        lambda: users.CreateUser(CreateUserRequest(user=User(email=f"{uuid4().hex}@example.org"))),
        lambda: posts.UpdatePost(UpdatePostRequest(post=Post(id=id, title="Notes"))),
        lambda: posts.CreatePost(CreatePostRequest(post=Post(author_id=ada.id, title="Notes"))),
    ]
    for call in calls:
        await repeat(call)
        for worker in nodes[1:]:
            await worker.fetch(TERMINATE)
        await repeat(call)


async def test_deleted_user_leaves_no_answer_about_posts_of_any_worker(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub, ada: User, nodes: list[Postgres]
) -> None:
    """The coordinator has the answers, and each worker has posts of the user."""
    creates = [
        CreatePostRequest(post=Post(author_id=ada.id, title=f"Secret {number}"), request_id=str(uuid4()))
        for number in range(20)
    ]
    await asyncio.gather(*map(posts.CreatePost, creates))
    stored = "SELECT count(*) FROM requests WHERE position('Secret'::bytea IN answer) > 0"
    assert await nodes[0].fetch(stored) == len(creates)

    await users.DeleteUser(DeleteUserRequest(id=ada.id))

    assert await nodes[0].fetch(stored) == 0
    assert await count_posts(nodes) == 0
    assert (await refusal(posts.CreatePost(creates[0]))).reason == "POST_NOT_FOUND"


async def test_load_resumes_after_workers_were_lost(
    posts: PostServiceAsyncStub, ada: User, nodes: list[Postgres], url: str
) -> None:
    """In the middle of a batch that has begun on them: each row is created once."""
    options = BulkOptions(load_id="posts", return_ids=True)
    rows = [Post(author_email="ada@example.org", title=f"Post {number}") for number in range(3 * POSTS)]
    call: Any = posts.BulkCreatePosts()
    await call.write(BulkCreatePostsRequest(options=options, posts=rows[:POSTS]))
    await call.read()
    first = (await call.read()).ack
    async with rival(url) as other:
        await other.execute(f"UPDATE users SET email = 'countess@example.org' WHERE id = {ada.id}")
        await call.write(BulkCreatePostsRequest(posts=rows[POSTS : 2 * POSTS]))
        await other.wait_for_blocked()
        for worker in nodes[1:]:
            await worker.fetch(TERMINATE_WAITING)
        await other.rollback()
    second = (await call.read()).ack
    await call.write(BulkCreatePostsRequest(posts=rows[2 * POSTS :], finish=True))
    third = (await call.read()).ack
    summary = (await call.read()).summary

    acks: list[BulkAck] = [first, second, third]
    assert [(ack.created, ack.HasField("error")) for ack in acks] == [(POSTS, False)] * 3
    assert (summary.created, summary.next_offset) == (3 * POSTS, 3 * POSTS)
    stored = await nodes[0].fetch("SELECT array_agg(id) FROM posts")
    assert sorted(stored) == sorted(id for ack in acks for id in ack.ids)


async def test_updates_in_crossing_order_are_all_applied(
    server: Server, posts: PostServiceAsyncStub, ada: User, nodes: list[Postgres]
) -> None:
    """Of the same posts, in several streams at once."""
    ids = await create_posts(posts, ada)
    orders = [ids, ids[::-1], ids[1::2] + ids[::2]]
    options = BulkOptions(update_mask=FieldMask(paths=["title"]))

    async def update(order: list[int]) -> list[tuple[int, bool]]:
        call = PostServiceStub(channel).BulkUpdatePosts()
        requests = [
            BulkUpdatePostsRequest(
                options=options if number == 0 else None,
                posts=[Post(id=id, title=f"Title {number}") for id in order],
                finish=number == 4,
            )
            for number in range(5)
        ]
        for request in requests:
            await call.write(request)
        acks = [event.ack async for event in call if event.HasField("ack")]
        return [(ack.updated, ack.HasField("error")) for ack in acks]

    async with grpc.aio.insecure_channel(server.address) as channel:
        answers = await asyncio.gather(*map(update, orders))

    assert answers == [[(POSTS, False)] * 5] * len(orders)
    assert await nodes[0].fetch("SELECT array_agg(DISTINCT version) FROM posts") == [1 + 5 * len(orders)]
