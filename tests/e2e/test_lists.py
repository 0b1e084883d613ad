"""Lists: filters, orders, pages, tokens, and the size limit of a page."""

from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from sqlalchemy import insert

from roster.v1.posts_pb2 import ListPostsRequest, ListPostsResponse
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    ListUsersRequest,
    ListUsersResponse,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from service.users import model
from tests.support.errors import refusal
from tests.support.rows import add_posts, add_users

MIB = 1 << 20
MAX_ANSWER_BYTES = 3 * MIB
NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
# The third is as old as the first; the e-mails go their own way.
PEOPLE: list[dict[str, Any]] = [
    {"email": "grace@example.org", "full_name": "Grace Hopper", "is_active": True, "created_at": NOON},
    {
        "email": "alan@example.net",
        "full_name": None,
        "is_active": False,
        "created_at": NOON + timedelta(days=1),
    },
    {"email": "barbara@example.org", "full_name": "Barbara", "is_active": True, "created_at": NOON},
    {
        "email": "ada@example.org",
        "full_name": "Ada",
        "is_active": True,
        "created_at": NOON - timedelta(days=1),
    },
]

ORDERS = {
    "": [1, 2, 3, 4],
    "id desc": [4, 3, 2, 1],
    "email": [4, 2, 3, 1],
    "email desc": [1, 3, 2, 4],
    "created_at asc": [4, 1, 3, 2],
    "created_at desc": [2, 3, 1, 4],
}
FILTERS = {
    "is_active = true": [1, 3, 4],
    "is_active = true AND id > 1": [3, 4],
    "id = 1 OR id = 4": [1, 4],
    "NOT (id = 1 OR id = 4)": [2, 3],
    'email : "example.org"': [1, 3, 4],
    'email = " ADA@Example.org"': [4],
    'email >= "b"': [1, 3],
    'full_name : "a"': [1, 3, 4],
    'full_name : "B"': [3],
    "full_name = null": [2],
    "full_name != null": [1, 3, 4],
    'created_at = "2024-01-31T12:00:00Z"': [1, 3],
    'created_at > "2024-01-31T13:00:00+01:00"': [2],
    "id > 4": [],
}


@pytest.fixture
async def people(server: Server) -> None:
    """Four users, with the ids 1 to 4."""
    async with server.database.begin() as session:
        await session.execute(insert(model.User), PEOPLE)


async def user_pages(users: UserServiceAsyncStub, **asked: Any) -> list[ListUsersResponse]:
    """Return all pages of a list of users."""
    pages = [await users.ListUsers(ListUsersRequest(**asked))]
    while pages[-1].next_page_token:
        request = ListUsersRequest(**asked, page_token=pages[-1].next_page_token)
        pages.append(await users.ListUsers(request))
    return pages


async def post_pages(posts: PostServiceAsyncStub, **asked: Any) -> list[ListPostsResponse]:
    """Return all pages of a list of posts."""
    pages = [await posts.ListPosts(ListPostsRequest(**asked))]
    while pages[-1].next_page_token:
        request = ListPostsRequest(**asked, page_token=pages[-1].next_page_token)
        pages.append(await posts.ListPosts(request))
    return pages


async def test_page_has_50_rows_by_default(server: Server, users: UserServiceAsyncStub) -> None:
    """The maximum is 1000; larger sizes are reduced to it."""
    ids = await add_users(server.database, 1001)

    assert [len(page.users) for page in await user_pages(users)] == [50] * 20 + [1]
    for page_size in (1000, 5000):
        pages = await user_pages(users, page_size=page_size)
        assert [len(page.users) for page in pages] == [1000, 1]
        assert [user.id for page in pages for user in page.users] == ids


async def test_list_without_rows_is_an_empty_page(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """It has no token."""
    assert await users.ListUsers(ListUsersRequest()) == ListUsersResponse()
    assert await posts.ListPosts(ListPostsRequest()) == ListPostsResponse()


@pytest.mark.usefixtures("people")
async def test_pages_follow_the_order(users: UserServiceAsyncStub) -> None:
    """With any page size; the id breaks ties, in the same direction."""
    for page_size, count in {1: 4, 2: 2, 3: 2, 4: 1, 50: 1}.items():
        found = {}
        for order_by in ORDERS:
            pages = await user_pages(users, order_by=order_by, page_size=page_size)
            assert len(pages) == count
            found[order_by] = [user.id for page in pages for user in page.users]
        assert found == ORDERS


@pytest.mark.usefixtures("people")
async def test_filter_selects_rows(users: UserServiceAsyncStub) -> None:
    """The same rows in a list, page by page, and in an export."""
    listed, exported = {}, {}
    for text in FILTERS:
        pages = await user_pages(users, filter=text, page_size=1)
        listed[text] = [user.id for page in pages for user in page.users]
        messages = [message async for message in users.ExportUsers(ExportUsersRequest(filter=text))]
        exported[text] = [user.id for message in messages for user in message.users]
    assert listed == FILTERS
    assert exported == FILTERS


@pytest.mark.usefixtures("people")
async def test_filters_and_orders_posts(server: Server, posts: PostServiceAsyncStub) -> None:
    """By their own fields; `author_id` restricts the list in addition to the filter."""
    await add_posts(server.database, [1, 2, 1, 3, 1])

    async def ids(**asked: Any) -> list[int]:
        return [post.id for page in await post_pages(posts, page_size=2, **asked) for post in page.posts]

    assert await ids(author_id=1) == [1, 3, 5]
    assert await ids(author_id=1, order_by="id desc") == [5, 3, 1]
    assert await ids(author_id=1, filter='title = "Post 2" OR title = "Post 3"') == [3]
    assert await ids(filter="author_id = 2 OR author_id = 3", order_by="created_at desc") == [4, 2]
    assert await ids(author_id=4) == []
    assert await ids(order_by="created_at") == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("people")
async def test_token_is_bound_to_filter_and_order(users: UserServiceAsyncStub) -> None:
    """Page size and view may change."""
    asked: dict[str, Any] = {"filter": "id > 0", "order_by": "email desc"}
    first = await users.ListUsers(ListUsersRequest(**asked, page_size=1))
    token = first.next_page_token

    for other in ({"filter": "id > 1"}, {"order_by": "email"}, {"order_by": "id desc"}, {"filter": ""}):
        request = ListUsersRequest(**{**asked, **other}, page_token=token)
        refused = await refusal(users.ListUsers(request))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")
    rest = await users.ListUsers(ListUsersRequest(**asked, page_token=token, view=User.WITH_POSTS))
    assert [user.id for user in rest.users] == [3, 2, 4]


@pytest.mark.usefixtures("people")
async def test_token_of_posts_is_bound_to_author(server: Server, posts: PostServiceAsyncStub) -> None:
    """Another `author_id`, or none, is refused."""
    await add_posts(server.database, [1, 1, 2, 2])
    first = await posts.ListPosts(ListPostsRequest(author_id=1, page_size=1))

    for author_id in (0, 2):
        request = ListPostsRequest(author_id=author_id, page_token=first.next_page_token)
        assert (await refusal(posts.ListPosts(request))).reason == "INVALID_PAGE_TOKEN"
    rest = await posts.ListPosts(ListPostsRequest(author_id=1, page_token=first.next_page_token))
    assert [post.id for post in rest.posts] == [2]


async def test_token_of_users_is_refused_for_posts(
    server: Server, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Even if filter and order are the same."""
    await add_users(server.database, 2)
    token = (await users.ListUsers(ListUsersRequest(page_size=1))).next_page_token

    refused = await refusal(posts.ListPosts(ListPostsRequest(page_token=token)))
    assert (refused.reason, refused.fields) == ("INVALID_PAGE_TOKEN", ["page_token"])


@pytest.mark.usefixtures("people")
async def test_pages_are_stable_while_users_change(users: UserServiceAsyncStub) -> None:
    """Each remaining user is listed once, even if the user that the token points at is deleted."""
    asked: dict[str, Any] = {"order_by": "email", "page_size": 2}
    first = await users.ListUsers(ListUsersRequest(**asked))
    assert [user.email for user in first.users] == ["ada@example.org", "alan@example.net"]

    for user in first.users:
        await users.DeleteUser(DeleteUserRequest(id=user.id))
    for email in ("aaron@example.org", "zoe@example.org"):
        await users.CreateUser(CreateUserRequest(user=User(email=email)))
    rest = []
    token = first.next_page_token
    while token:
        page = await users.ListUsers(ListUsersRequest(**asked, page_token=token))
        rest += [user.email for user in page.users]
        token = page.next_page_token
    assert rest == ["barbara@example.org", "grace@example.org", "zoe@example.org"]


@pytest.mark.parametrize("order_by", ["id", "created_at desc"])
async def test_pages_of_large_posts_end_early(
    server: Server, posts: PostServiceAsyncStub, order_by: str
) -> None:
    """No page is larger than 3 MiB, and the pages have every post once."""
    author_ids = await add_users(server.database, full_name="😀" * 255)
    ids = await add_posts(server.database, author_ids * 5, title="😀" * 255, content="é" * (MIB // 2))
    ids += await add_posts(server.database, author_ids * 5)

    pages = await post_pages(posts, order_by=order_by, page_size=8, view=Post.WITH_AUTHOR)
    assert all(page.ByteSize() <= MAX_ANSWER_BYTES for page in pages)
    found = [post.id for page in pages for post in page.posts]
    assert found == (ids if order_by == "id" else ids[::-1])
    sizes = [len(page.posts) for page in pages]
    assert sizes == ([2, 2, 6] if order_by == "id" else [7, 2, 1])


async def test_pages_of_users_with_many_posts_end_early(server: Server, users: UserServiceAsyncStub) -> None:
    """No page is larger than 3 MiB, and the pages have every user once."""
    ids = await add_users(server.database, 80)
    await add_posts(server.database, ids * 50, title="😀" * 255)

    pages = await user_pages(users, view=User.WITH_POSTS, page_size=1000)
    assert len(pages) == 2
    assert all(page.ByteSize() <= MAX_ANSWER_BYTES for page in pages)
    found = [(user.id, len(user.posts)) for page in pages for user in page.users]
    assert found == [(id, 50) for id in ids]
