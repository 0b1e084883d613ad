"""The rows of `make bench-citus`, and the calls and bulk streams on them: the same in each database."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from google.protobuf.field_mask_pb2 import FieldMask

from bench.rows import bulk_options, requests
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
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    CountUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
)

POSTS_OF_USER = 20  # on average
BATCH = 100
EXPORTED = 20_000  # rows of a call
STEP = 7919  # a prime: its multiples visit all numbers of a range, far from one another
CONTENT = "some words of a post " * 15
TITLE = FieldMask(paths=["title"])

FILL_USERS = """
INSERT INTO users (email, full_name)
SELECT 'user' || number || '@example.org', 'User ' || number FROM generate_series(1, {users}) AS number
"""
# The authors of the first tenth are the last users, who have 20 posts each. One author has one in 72 of the
# other posts. Of the rest, few have many.
FILL_POSTS = """
INSERT INTO posts (title, content, created_at, author_id)
SELECT 'Title ' || number % 1000, '{content}', now() - ({posts} - number) * interval '1 second', CASE
    WHEN number <= {posts} / 10 THEN {authors} + 1 + (number - 1) / {of_user}
    WHEN number % 72 = 0 THEN {busy}
    ELSE 1 + floor({authors} * power(number * {step} % {posts} / {posts}.0, 2))::bigint * {step} % {authors}
END
FROM generate_series(1, {posts}) AS number
"""


@dataclass(frozen=True)
class Call:
    """Calls of the method with which the name begins: `request` returns the one with a number.

    A run has at most `calls` of them, if not 0. It is reported for each of the `units` of a call.
    """

    name: str
    request: Callable[[int], Any]
    calls: int = 0
    units: int = 1


@dataclass(frozen=True)
class Stream:
    """A bulk stream of the method with which the name begins; `messages` returns the one with a number."""

    name: str
    messages: Callable[[int], list[bytes]]
    rows: int


def path(name: str) -> str:
    """Return the path of the method with which a name begins."""
    method = name.partition(" ")[0].rstrip(",")
    service = "UserService" if "User" in method else "PostService"
    return f"/roster.v1.{service}/{method}"


class Rows:
    """The users and posts of a database, with the ids 1, 2, 3, ….

    Reads use all of them. The posts of the first tenth are deleted with their authors, those of the second
    half alone; those in between are updated.
    """

    def __init__(self, posts: int) -> None:
        self.posts = posts
        self.users = posts // POSTS_OF_USER
        self.authors = self.users * 9 // 10  # whom no call deletes
        self.busy = self.authors // 2  # the author of one post in 80
        self.bulk = posts // 20  # rows of a stream

    def fill(self) -> tuple[str, str]:
        """Return the statements that create the rows."""
        figures = {**vars(self), "content": CONTENT, "of_user": POSTS_OF_USER, "step": STEP}
        return FILL_USERS.format(**figures), FILL_POSTS.format(**figures)

    def reads(self, deep: str) -> list[Call]:
        """Return the reads; `deep` is the token of a page of all posts."""
        user, post = self._user, self._post
        posts, author = User.WITH_POSTS, Post.WITH_AUTHOR
        return [
            Call("GetUser", lambda n: GetUserRequest(id=user(n))),
            Call("GetUser by e-mail", lambda n: GetUserRequest(email=f"user{user(n)}@example.org")),
            Call("GetUser WITH_POSTS", lambda n: GetUserRequest(id=user(n), view=posts)),
            Call("GetUser WITH_POSTS, busy", lambda _: GetUserRequest(id=self.busy, view=posts)),
            Call("GetPost", lambda n: GetPostRequest(id=post(n))),
            Call("GetPost WITH_AUTHOR", lambda n: GetPostRequest(id=post(n), view=author)),
            Call("BatchGetUsers", lambda n: BatchGetUsersRequest(ids=_batch(n, user))),
            Call("BatchGetUsers WITH_POSTS", lambda n: BatchGetUsersRequest(ids=_batch(n, user), view=posts)),
            Call("BatchGetPosts", lambda n: BatchGetPostsRequest(ids=_batch(n, post))),
            Call(
                "BatchGetPosts WITH_AUTHOR", lambda n: BatchGetPostsRequest(ids=_batch(n, post), view=author)
            ),
            Call("ListUsers", lambda _: ListUsersRequest()),
            Call("ListUsers WITH_POSTS", lambda _: ListUsersRequest(view=posts)),
            Call("ListPosts", lambda _: ListPostsRequest()),
            Call("ListPosts, deep page", lambda _: ListPostsRequest(page_token=deep)),
            Call("ListPosts, newest first", lambda _: ListPostsRequest(order_by="created_at desc")),
            Call("ListPosts, title", lambda n: ListPostsRequest(filter=f'title = "Title {n % 1000}"')),
            Call("ListPosts of author", lambda n: ListPostsRequest(author_id=user(n))),
            Call(
                "ListPosts of author, WITH_AUTHOR",
                lambda n: ListPostsRequest(author_id=user(n), view=author),
            ),
            Call("CountUsers", lambda _: CountUsersRequest()),
            Call("CountPosts", lambda _: CountPostsRequest()),
            Call("CountPosts of author", lambda n: CountPostsRequest(author_id=user(n))),
            self._export("ExportUsers", ExportUsersRequest, self.users),
            self._export("ExportPosts", ExportPostsRequest, self.posts),
        ]

    def _export(self, method: str, request: Any, rows: int) -> Call:
        exported = min(EXPORTED, rows)
        message = request(after_id=rows - exported)
        return Call(f"{method}, 1,000 rows", lambda _: message, units=exported // 1000)

    def writes(self) -> list[Call]:
        """Return the writes of single rows."""
        return [
            Call("CreateUser", lambda n: CreateUserRequest(user=User(email=f"new{n}@example.org"))),
            Call("CreatePost", lambda n: CreatePostRequest(post=self._new(n))),
            Call(
                "CreatePost with request_id",
                lambda n: CreatePostRequest(post=self._new(n), request_id=str(uuid4())),
            ),
            Call("UpdatePost", lambda n: UpdatePostRequest(post=self._changed(n), update_mask=TITLE)),
            Call("DeletePost", lambda n: DeletePostRequest(id=self.posts // 2 + 1 + n)),
            Call(
                f"DeleteUser with {POSTS_OF_USER} posts",
                lambda n: DeleteUserRequest(id=self.authors + 1 + n),
                calls=self.users // 100,
            ),
        ]

    def streams(self) -> list[Stream]:
        """Return the bulk streams."""
        return [
            Stream("BulkCreateUsers", self._create_users, self.bulk),
            Stream("BulkCreatePosts by author_email", self._create_posts, self.bulk),
            Stream("BulkUpdatePosts", self._update_posts, self.bulk),
            Stream("BulkDeletePosts", self._delete_posts, self.bulk),
        ]

    def _create_users(self, number: int) -> list[bytes]:
        users = [User(email=f"bulk{number}-{row}@example.org") for row in range(self.bulk)]
        return requests(BulkCreateUsersRequest, "users", users, bulk_options(f"create users {number}"))

    def _create_posts(self, number: int) -> list[bytes]:
        posts = [
            Post(title="Title", content=CONTENT, author_email=f"user{self._user(row)}@example.org")
            for row in range(self.bulk)
        ]
        return requests(BulkCreatePostsRequest, "posts", posts, bulk_options(f"create posts {number}"))

    def _update_posts(self, number: int) -> list[bytes]:
        posts = [self._changed(number + row) for row in range(self.bulk)]
        options = bulk_options(f"update posts {number}", update_mask=TITLE)
        return requests(BulkUpdatePostsRequest, "posts", posts, options)

    def _delete_posts(self, number: int) -> list[bytes]:
        last = self.posts - number * self.bulk
        keys = [PostKey(id=last - row) for row in range(self.bulk)]
        return requests(BulkDeletePostsRequest, "posts", keys, bulk_options(f"delete posts {number}"))

    def _user(self, number: int) -> int:
        return 1 + number * STEP % self.authors

    def _post(self, number: int) -> int:
        return 1 + number * STEP % self.posts

    def _new(self, number: int) -> Post:
        return Post(title="Title", content=CONTENT, author_id=self._user(number))

    def _changed(self, number: int) -> Post:
        first, last = self.posts // 10 + 1, self.posts // 2
        return Post(id=first + number * STEP % (last - first), title=f"Changed {number}")


def _batch(number: int, id: Callable[[int], int]) -> list[int]:
    return [id(number * BATCH + row) for row in range(BATCH)]
