"""The filters in docs/filtering.md find what the page says."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from roster.v1.posts_pb2 import ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.users_pb2 import ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.posts.model import Post
from service.server import Server
from service.users.model import User

PAGE = (Path(__file__).parents[2] / "docs/filtering.md").read_text()
TABLE = re.compile(r"^\| filter \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
IN_2024, LATER = datetime(2024, 1, 31, 9, 30, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)
USERS: list[dict[str, Any]] = [
    {"id": 1, "email": "ada@example.org", "full_name": "Ada", "created_at": IN_2024},
    {"id": 2, "email": "adam@example.com", "full_name": "", "created_at": IN_2024},
    {"id": 3, "email": "ann@example.org", "full_name": "Ann", "created_at": LATER},
    {"id": 4, "email": "bob@example.org", "full_name": None, "is_active": False, "created_at": LATER},
    {"id": 7, "email": "zoe@example.net", "full_name": "Zoe", "created_at": LATER},
]
TITLES = ["draft", "A draft of it", "*", "5*3", "583", "Always", "always"]
AUTHORS = [1, 2, 3, 4, 7, 7, 1]

# The ids of the users that the filters of the page find.
USER_FILTERS = {
    'is_active = true AND (email : "@example.org" OR created_at >= "2024-01-01T00:00:00Z")': [1, 2, 3, 7],
    'email = "ada*"': [1, 2],
    'email = "Ada*"': [1, 2],
    'email = "*@example.org"': [1, 3, 4],
    'full_name = "*"': [1, 2, 3, 7],
    'full_name : ""': [1, 2, 3, 7],
    "full_name:*": [1, 2, 3, 7],
    'full_name : "*"': [1, 2, 3, 7],
    "-full_name:*": [4],
    "NOT full_name:*": [4],
    "full_name = null": [4],
    "full_name != null": [1, 2, 3, 7],
    "-is_active = true": [4],
    'full_name != "Ann"': [1, 2, 7],
    'NOT full_name = "Ann"': [1, 2, 7],
    'full_name != "Ann" OR full_name = null': [1, 2, 4, 7],
    'full_name != "*"': [],
    'email = "Ann@Example.org"': [3],
    'email : "@example.org" AND NOT is_active = true': [4],
    'created_at >= "2024-01-01T00:00:00Z" AND created_at < "2025-01-01T00:00:00Z"': [1, 2],
    'created_at >= "2024-01-31T00:00:00Z" AND email : "ada"': [1, 2],
}
# The same for posts.
POST_FILTERS = {
    'title = "*draft*"': [1, 2],
    'title : "draft"': [1, 2],
    r'title = "\*"': [3],
    'title = "5*3"': [4],
    'title = "**"': [1, 2, 3, 4, 5, 6, 7],
    'title = "***"': [3, 4],
    "author_id = 7 OR author_id = 9": [5, 6],
    'title = "A*"': [2, 6],
}


@pytest.fixture
async def filled(server: Server) -> None:
    """A server with users and posts."""
    posts = [
        {"id": id, "title": title, "content": "", "author_id": author}
        for id, (title, author) in enumerate(zip(TITLES, AUTHORS, strict=True), 1)
    ]
    async with server.database.begin() as session:
        for user in USERS:
            await session.execute(insert(User).values(**user))
        await session.execute(insert(Post), posts)


def test_every_example_of_the_page_is_here() -> None:
    """Those of the tables; and all that are here are on the page."""
    tables = "".join(TABLE.findall(PAGE))
    examples = {
        example for row in tables.splitlines() for example in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    }
    assert len(examples) >= 10
    assert examples <= USER_FILTERS.keys() | POST_FILTERS.keys()
    words = " ".join(PAGE.split())
    assert [text for text in (*USER_FILTERS, *POST_FILTERS) if text not in words] == []


@pytest.mark.usefixtures("filled")
async def test_examples_find_what_the_page_says(
    users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    found = {
        text: [user.id for user in (await users.ListUsers(ListUsersRequest(filter=text))).users]
        for text in USER_FILTERS
    }
    assert found == USER_FILTERS
    found = {
        text: [post.id for post in (await posts.ListPosts(ListPostsRequest(filter=text))).posts]
        for text in POST_FILTERS
    }
    assert found == POST_FILTERS
