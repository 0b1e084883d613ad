"""CountUsers and CountPosts."""

from typing import Any

import pytest

from roster.v1.posts_pb2 import CountPostsRequest, CountPostsResponse
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.users_pb2 import CountUsersRequest, CountUsersResponse
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.rows import add_posts, add_users

LONG_FILTER = " OR ".join(f"id = {id}" for id in range(1, 40))  # its statement is not kept


@pytest.fixture
async def author_ids(server: Server) -> list[int]:
    """Twelve users, of whom the first has two posts and the second one."""
    ids = await add_users(server.database, 12)
    await add_posts(server.database, [ids[0], ids[1], ids[0]])
    return ids


@pytest.mark.usefixtures("author_ids")
async def test_counts_matching_rows_up_to_a_limit(users: UserServiceAsyncStub) -> None:
    """The count is exact if no more rows match than the limit."""
    expected: dict[tuple[str, int], tuple[int, bool]] = {
        ("", 0): (12, True),
        ("", 1): (1, False),
        ("", 11): (11, False),
        ("", 12): (12, True),
        ("", 1_000_000): (12, True),
        ("id <= 3", 2): (2, False),
        ('email = " USER1@Example.org"', 1): (1, True),
        (LONG_FILTER, 0): (12, True),
        ('email : "nobody"', 0): (0, True),
        ('email : "nobody"', 1): (0, True),
    }
    for (text, at_most), (count, is_exact) in expected.items():
        counted = await users.CountUsers(CountUsersRequest(filter=text, at_most=at_most))
        assert counted == CountUsersResponse(count=count, is_exact=is_exact), text


async def test_counts_posts_of_one_author(posts: PostServiceAsyncStub, author_ids: list[int]) -> None:
    """In addition to the filter; a user without posts, or who does not exist, has none."""
    first, second, third, *_ = author_ids

    async def count(**fields: Any) -> CountPostsResponse:
        return await posts.CountPosts(CountPostsRequest(**fields))

    assert await count() == CountPostsResponse(count=3, is_exact=True)
    assert await count(author_id=first) == CountPostsResponse(count=2, is_exact=True)
    assert await count(author_id=first, at_most=1) == CountPostsResponse(count=1, is_exact=False)
    assert await count(author_id=second, filter='title = "Post 0"') == CountPostsResponse(is_exact=True)
    for nobody in (third, 2**53):
        assert await count(author_id=nobody) == CountPostsResponse(is_exact=True)
