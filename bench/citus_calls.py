"""The rows of `make bench-citus`, and the calls and bulk streams on them: the same in each database."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from google.protobuf.field_mask_pb2 import FieldMask

from bench.rows import bulk_options, requests
from roster.v1 import posts_pb2, users_pb2
from roster.v1.resources_pb2 import Post, User

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
FROM generate_series(1::bigint, {posts}) AS number
"""


def find_method(name: str) -> tuple[str, Any]:
    """Return the path of the method with which a name begins, and the class of its requests."""
    method = name.partition(" ")[0].rstrip(",")
    kind, module = ("User", users_pb2) if "User" in method else ("Post", posts_pb2)
    return f"/roster.v1.{kind}Service/{method}", getattr(module, f"{method}Request")


@dataclass(frozen=True)
class Call:
    """Calls of the method with which the name begins: `fields` returns those of the request with a number.

    A run has at most `calls` of them, if not 0. It is reported for each of the `units` of a call.
    """

    name: str
    fields: Callable[[int], dict[str, Any]]
    calls: int = 0
    units: int = 1

    def send(self, channel: Any, number: int) -> bytes:
        """Make a call, and return the last message of the answer."""
        path, request = find_method(self.name)
        message = request(**self.fields(number)).SerializeToString()
        if "Export" not in path:
            return bytes(channel.unary_unary(path)(message))
        *_, last = channel.unary_stream(path)(message)
        return bytes(last)


@dataclass(frozen=True)
class Stream:
    """Bulk streams of the method with which the name begins: `rows` returns the rows of a stream."""

    name: str
    rows: Callable[[int], Sequence[Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def messages(self, number: int) -> tuple[list[bytes], int]:
        """Return a stream as serialized messages, and the number of its rows."""
        rows = self.rows(number)
        _, request = find_method(self.name)
        options = bulk_options(f"{self.name} {number}", **self.options)
        return requests(request, "users" if "User" in self.name else "posts", rows, options), len(rows)


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
        self._bulk = range(posts // 20)  # rows of a stream

    def fill(self) -> tuple[str, str]:
        """Return the statements that create the rows."""
        figures = {**vars(self), "content": CONTENT, "of_user": POSTS_OF_USER, "step": STEP}
        return FILL_USERS.format(**figures), FILL_POSTS.format(**figures)

    def reads(self, deep: str) -> list[Call]:
        """Return the reads; `deep` is the token of a page of all posts."""
        user, post = self._user, self._post
        posts, author = {"view": User.WITH_POSTS}, {"view": Post.WITH_AUTHOR}
        return [
            Call("GetUser", lambda n: {"id": user(n)}),
            Call("GetUser by e-mail", lambda n: {"email": _email(user(n))}),
            Call("GetUser WITH_POSTS", lambda n: {"id": user(n), **posts}),
            Call("GetUser WITH_POSTS, 5,000 posts", lambda _: {"id": self.busy, **posts}),
            Call("GetPost", lambda n: {"id": post(n)}),
            Call("GetPost WITH_AUTHOR", lambda n: {"id": post(n), **author}),
            Call("BatchGetUsers", lambda n: {"ids": _batch(n, user)}),
            Call("BatchGetUsers WITH_POSTS", lambda n: {"ids": _batch(n, user), **posts}),
            Call("BatchGetPosts", lambda n: {"ids": _batch(n, post)}),
            Call("BatchGetPosts WITH_AUTHOR", lambda n: {"ids": _batch(n, post), **author}),
            Call("ListUsers", lambda _: {}),
            Call("ListUsers WITH_POSTS", lambda _: posts),
            Call("ListPosts", lambda _: {}),
            Call("ListPosts, deep page", lambda _: {"page_token": deep}),
            Call("ListPosts, newest first", lambda _: {"order_by": "created_at desc"}),
            Call("ListPosts, title", lambda n: {"filter": f'title = "Title {n % 1000}"'}),
            Call("ListPosts of author", lambda n: {"author_id": user(n)}),
            Call("ListPosts of author, WITH_AUTHOR", lambda n: {"author_id": user(n), **author}),
            Call("CountUsers", lambda _: {}),
            Call("CountPosts", lambda _: {}),
            Call("CountPosts of author", lambda n: {"author_id": user(n)}),
            _export("ExportUsers", self.users),
            _export("ExportPosts", self.posts),
        ]

    def writes(self) -> list[Call]:
        """Return the writes of single rows."""

        def new(number: int) -> dict[str, Any]:
            return {"post": Post(title="Title", content=CONTENT, author_id=self._user(number))}

        deleted, users = self.posts // 2 + 1, self.authors + 1
        return [
            Call("CreateUser", lambda n: {"user": User(email=f"new{n}@example.org")}),
            Call("CreatePost", new),
            Call("CreatePost with request_id", lambda n: {**new(n), "request_id": str(uuid4())}),
            Call("UpdatePost", lambda n: {"post": self._changed(n), "update_mask": TITLE}),
            Call("DeletePost", lambda n: {"id": deleted + n}),
            Call("DeleteUser with 20 posts", lambda n: {"id": users + n}, calls=self.users // 100),
        ]

    def streams(self) -> list[Stream]:
        """Return the bulk streams."""

        def users(number: int) -> list[User]:
            return [User(email=f"bulk{number}-{row}@example.org") for row in self._bulk]

        def posts(_: int) -> list[Post]:
            emails = [_email(self._user(row)) for row in self._bulk]
            return [Post(title="Title", content=CONTENT, author_email=email) for email in emails]

        def changes(number: int) -> list[Post]:
            return [self._changed(number + row) for row in self._bulk]

        def keys(number: int) -> list[Any]:
            last = self.posts - number * len(self._bulk)
            return [posts_pb2.PostKey(id=last - row) for row in self._bulk]

        return [
            Stream("BulkCreateUsers", users),
            Stream("BulkCreatePosts by author_email", posts),
            Stream("BulkUpdatePosts", changes, {"update_mask": TITLE}),
            Stream("BulkDeletePosts", keys),
        ]

    def _user(self, number: int) -> int:
        return 1 + number * STEP % self.authors

    def _post(self, number: int) -> int:
        return 1 + number * STEP % self.posts

    def _changed(self, number: int) -> Post:
        first, last = self.posts // 10 + 1, self.posts // 2
        return Post(id=first + number * STEP % (last - first), title=f"Changed {number}")


def _email(id: int) -> str:
    return f"user{id}@example.org"


def _batch(number: int, id: Callable[[int], int]) -> list[int]:
    return [id(number * BATCH + row) for row in range(BATCH)]


def _export(method: str, rows: int) -> Call:
    exported = min(EXPORTED, rows)
    return Call(f"{method}, 1,000 rows", lambda _: {"after_id": rows - exported}, units=exported // 1000)
