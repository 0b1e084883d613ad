"""Single posts and batches of posts, through the API."""

import asyncio
from uuid import uuid4

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.posts_pb2 import (
    BatchGetPostsRequest,
    BatchGetPostsResponse,
    CreatePostRequest,
    DeletePostRequest,
    GetPostRequest,
    ListPostsRequest,
    UpdatePostRequest,
)
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import CreateUserRequest, DeleteUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.errors import refusal
from tests.support.rows import add_posts, add_users

MIB = 1 << 20
MAX_ANSWER_BYTES = 3 * MIB


@pytest.fixture
async def ada(users: UserServiceAsyncStub) -> User:
    """An author."""
    return await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org", full_name="Ada")))


@pytest.fixture
async def notes(posts: PostServiceAsyncStub, ada: User) -> Post:
    """A post."""
    post = Post(author_id=ada.id, title="Notes", content="On the engine")
    return await posts.CreatePost(CreatePostRequest(post=post))


async def test_new_post_has_id_version_and_times(posts: PostServiceAsyncStub, ada: User) -> None:
    """Output-only fields are ignored; missing content is empty."""
    sent = Post(id=4711, author_id=ada.id, title="Notes", version=9, author=User(id=4711))
    created = await posts.CreatePost(CreatePostRequest(post=sent))

    assert created == Post(
        id=1,
        author_id=ada.id,
        title="Notes",
        content="",
        version=1,
        created_at=created.created_at,
        updated_at=created.created_at,
    )
    assert created.created_at.ToNanoseconds() >= ada.created_at.ToNanoseconds()
    assert await posts.GetPost(GetPostRequest(id=1)) == created


async def test_post_needs_an_existing_author(
    posts: PostServiceAsyncStub, users: UserServiceAsyncStub, ada: User
) -> None:
    """Unknown ids and ids of deleted users are refused."""
    await users.DeleteUser(DeleteUserRequest(id=ada.id))

    for author_id in (ada.id, 4711):
        refused = await refusal(
            posts.CreatePost(CreatePostRequest(post=Post(author_id=author_id, title="x")))
        )
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "AUTHOR_NOT_FOUND")


async def test_unknown_post_is_not_found(posts: PostServiceAsyncStub) -> None:
    """By reads, updates and deletes."""
    for call in (
        posts.GetPost(GetPostRequest(id=4711)),
        posts.UpdatePost(UpdatePostRequest(post=Post(id=4711, title="x"))),
        posts.DeletePost(DeletePostRequest(id=4711)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "POST_NOT_FOUND")


async def test_view_adds_the_author(posts: PostServiceAsyncStub, ada: User, notes: Post) -> None:
    """To each kind of read, on request."""
    view = Post.WITH_AUTHOR
    found = [
        await posts.GetPost(GetPostRequest(id=notes.id, view=view)),
        *(await posts.BatchGetPosts(BatchGetPostsRequest(ids=[notes.id], view=view))).posts,
        *(await posts.ListPosts(ListPostsRequest(view=view))).posts,
    ]

    notes.author.CopyFrom(ada)
    assert found == [notes] * 3
    notes.ClearField("author")
    assert await posts.GetPost(GetPostRequest(id=notes.id)) == notes


async def test_batch_has_posts_in_requested_order(
    server: Server, posts: PostServiceAsyncStub, ada: User
) -> None:
    """Each once, at its first place; missing ids are listed separately."""
    first, second, third = await add_posts(server.database, [ada.id] * 3)

    answer = await posts.BatchGetPosts(BatchGetPostsRequest(ids=[third, 4711, first, third, second, 4712]))
    assert [post.id for post in answer.posts] == [third, first, second]
    assert list(answer.missing_ids) == [4711, 4712]
    assert list(answer.remaining_ids) == []


@pytest.mark.parametrize("view", [Post.BASIC, Post.WITH_AUTHOR])
async def test_batch_of_large_posts_is_cut_at_3_mib(
    server: Server, posts: PostServiceAsyncStub, view: Post.View.ValueType
) -> None:
    """Repeated calls for the remaining ids return all posts."""
    author_ids = await add_users(server.database, full_name="😀" * 255)
    ids = await add_posts(server.database, author_ids * 7, title="😀" * 255, content="é" * (MIB // 2))

    answers: list[BatchGetPostsResponse] = []
    remaining = [*ids, 4711]
    while remaining:
        request = BatchGetPostsRequest(ids=remaining, view=view)
        answers.append(await posts.BatchGetPosts(request))
        remaining = list(answers[-1].remaining_ids)
    assert [len(answer.posts) for answer in answers] == [2, 2, 2, 1]
    assert all(answer.ByteSize() <= MAX_ANSWER_BYTES for answer in answers)
    assert [post.id for answer in answers for post in answer.posts] == ids
    assert {len(post.content) for answer in answers for post in answer.posts} == {MIB // 2}
    assert list(answers[-1].missing_ids) == [4711]


async def test_missing_ids_count_in_the_size_of_a_batch(server: Server, posts: PostServiceAsyncStub) -> None:
    """Contents that nearly fill 3 MiB leave no space for the ids of missing posts."""
    content = "x" * (MIB - 110)
    ids = await add_posts(server.database, await add_users(server.database) * 3, content=content)

    missing = [2**53 - i for i in range(997)]
    answer = await posts.BatchGetPosts(BatchGetPostsRequest(ids=[*missing, *ids]))
    assert answer.ByteSize() <= MAX_ANSWER_BYTES
    assert [post.id for post in answer.posts] + list(answer.remaining_ids) == ids
    assert list(answer.missing_ids) == missing


@pytest.mark.parametrize(
    ("sent", "mask", "expected"),
    [
        (Post(title="More"), [], ("More", "On the engine")),
        (Post(content=""), [], ("Notes", "")),
        (Post(title="More", content="x"), ["title"], ("More", "On the engine")),
        (Post(title="More"), ["content"], ("Notes", "")),
        (Post(title="More"), ["*"], ("More", "")),
    ],
    ids=["set", "set to nothing", "named", "named but unset", "every field"],
)
async def test_update_writes_set_or_named_fields(
    posts: PostServiceAsyncStub, notes: Post, sent: Post, mask: list[str], expected: tuple[str, str]
) -> None:
    """The response is the updated post with the next version and the same author."""
    request = UpdatePostRequest(post=sent, update_mask=FieldMask(paths=mask))
    request.post.id, request.post.author_id = notes.id, 4711
    updated = await posts.UpdatePost(request)

    assert (updated.title, updated.content) == expected
    assert (updated.author_id, updated.version) == (notes.author_id, 2)
    assert updated.created_at == notes.created_at
    assert await posts.GetPost(GetPostRequest(id=notes.id)) == updated


@pytest.mark.parametrize(
    ("sent", "mask", "reason"),
    [
        (Post(author_id=1), ["author_id"], "INVALID_MASK"),
        (Post(author_id=1), [], "INVALID_FIELD"),
        (Post(content="x"), ["title"], "INVALID_FIELD"),
    ],
)
async def test_update_refuses_author_and_empty_title(
    posts: PostServiceAsyncStub, notes: Post, sent: Post, mask: list[str], reason: str
) -> None:
    """The author can't change, and a title can't be unset."""
    request = UpdatePostRequest(post=sent, update_mask=FieldMask(paths=mask))
    request.post.id = notes.id

    assert (await refusal(posts.UpdatePost(request))).reason == reason
    assert await posts.GetPost(GetPostRequest(id=notes.id)) == notes


async def test_expected_version_must_be_current(posts: PostServiceAsyncStub, notes: Post) -> None:
    """In updates and deletes, unless it is 0. The error has the current version."""
    await posts.UpdatePost(UpdatePostRequest(post=Post(id=notes.id, title="More", version=1)))
    for call in (
        posts.UpdatePost(UpdatePostRequest(post=Post(id=notes.id, title="Most", version=1))),
        posts.DeletePost(DeletePostRequest(id=notes.id, version=1)),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH")
        assert refused.facts == {"version": "2"}

    await posts.UpdatePost(UpdatePostRequest(post=Post(id=notes.id, title="Most")))
    assert await posts.DeletePost(DeletePostRequest(id=notes.id, version=3)) == Empty()
    assert (await refusal(posts.GetPost(GetPostRequest(id=notes.id)))).reason == "POST_NOT_FOUND"


async def test_posts_are_deleted_with_their_author(
    posts: PostServiceAsyncStub, users: UserServiceAsyncStub, notes: Post
) -> None:
    """No post of a deleted user remains."""
    await users.DeleteUser(DeleteUserRequest(id=notes.author_id))

    assert (await refusal(posts.GetPost(GetPostRequest(id=notes.id)))).reason == "POST_NOT_FOUND"


async def test_repeated_write_is_answered_once_applied(posts: PostServiceAsyncStub, ada: User) -> None:
    """Creates, updates and deletes may share a `request_id`."""
    request_id = str(uuid4())
    create = CreatePostRequest(post=Post(author_id=ada.id, title="Notes"), request_id=request_id)
    created = await posts.CreatePost(create)
    update = UpdatePostRequest(post=Post(id=created.id, title="More"), request_id=request_id)
    updated = await posts.UpdatePost(update)
    assert await posts.CreatePost(create) == created
    assert await posts.UpdatePost(update) == updated
    delete = DeletePostRequest(id=created.id, request_id=request_id)
    await posts.DeletePost(delete)

    assert (updated.title, updated.version) == ("More", 2)
    assert await posts.DeletePost(delete) == Empty()
    for erased in (posts.CreatePost(create), posts.UpdatePost(update)):  # with the post
        assert (await refusal(erased)).reason == "POST_NOT_FOUND"
    assert not (await posts.ListPosts(ListPostsRequest())).posts


async def test_request_id_with_another_body_is_refused(posts: PostServiceAsyncStub, notes: Post) -> None:
    """Nothing is written."""
    request = UpdatePostRequest(post=Post(id=notes.id, title="More"), request_id=str(uuid4()))
    updated = await posts.UpdatePost(request)

    request.post.title = "Most"
    assert (await refusal(posts.UpdatePost(request))).reason == "REQUEST_ID_REUSED"
    assert await posts.GetPost(GetPostRequest(id=notes.id)) == updated


async def test_concurrent_calls_with_one_request_id_write_one_row(
    posts: PostServiceAsyncStub, ada: User
) -> None:
    """Posts have no unique key, so without the id there would be five."""
    request = CreatePostRequest(post=Post(author_id=ada.id, title="Notes"), request_id=str(uuid4()))
    answers = await asyncio.gather(*(posts.CreatePost(request) for _ in range(5)))

    assert answers == [answers[0]] * 5
    assert list((await posts.ListPosts(ListPostsRequest())).posts) == [answers[0]]
