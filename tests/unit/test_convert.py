"""Conversions from messages to values and from rows to messages, for single rows and in bulk."""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import assume, given, settings, strategies as st

from roster.errors import InvalidField, InvalidMask
from roster.v1.posts_pb2 import UpdatePostRequest
from roster.v1.resources_pb2 import Post as PostMessage, User as UserMessage
from roster.v1.users_pb2 import GetUserRequest
from service.db.base import Entity, Values, column_names
from service.posts.convert import (
    post_batch_from_messages,
    post_from_message,
    post_to_message,
    post_update_from_request,
    post_with_author_to_fields,
)
from service.posts.model import Post
from service.users.convert import (
    BULK_WRITABLE,
    keys_from_request,
    user_batch_from_messages,
    user_changes_from_message,
    user_from_message,
    user_to_message,
    user_with_posts_to_fields,
)
from service.users.model import User
from service.users.newest_posts import UserWithPosts
from service.users.rules import OPTIONAL_TEXTS, normalise_email

NOON = 1_706_702_400_123_456  # microseconds since 1970
HOUR = 3_600_000_000
# What the database gives a row.
GIVEN: dict[str, Any] = {"id": 7, "version": 3, "created_at": NOON, "updated_at": NOON + HOUR}
UNSET_TEXTS = dict.fromkeys(OPTIONAL_TEXTS)
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQxMjM0NTY$dGhpcyBpcyBub3QgYSBoYXNoIGF0IGFsbA"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
emails = st.builds("{}@{}".format, *[st.text("aÀé\u0301Z0.", min_size=1, max_size=9)] * 2)
user_messages = st.builds(
    UserMessage,
    email=st.one_of(emails, emails.map(" {}\n".format), texts),
    full_name=st.none() | texts,
    is_active=st.none() | st.booleans(),
    hashed_password=st.sampled_from(["", HASH, "clear"]),
)
post_messages = st.builds(PostMessage, author_id=st.integers(-1, 3), title=texts, content=st.none() | texts)


def row_of(model: type[Entity], values: dict[str, Any]) -> Any:
    """Return a row as a read returns it; columns without a value are null."""
    names = column_names(model)
    row: Any = namedtuple("Row", names)  # type: ignore[misc]  # noqa: PYI024
    return row._make(values.get(name) for name in names)


def user_values(message: UserMessage) -> Values | None:
    try:
        return user_from_message(message)
    except InvalidField:
        return None


def post_values(message: PostMessage) -> Values | None:
    try:
        return post_from_message(message)
    except InvalidField:
        return None


@settings(deadline=None)
@given(message=user_messages)
def test_user_keeps_every_writable_field(message: UserMessage) -> None:
    """Except for the hash, which is never returned, and the e-mail, which is normalised."""
    values = user_values(message)
    assume(values is not None)
    assert values is not None  # for mypy
    answer = user_to_message(row_of(User, {"full_name": None, "is_active": True, **GIVEN, **values}))

    assert answer == UserMessage(
        id=7,
        version=3,
        created_at=Timestamp(seconds=1706702400, nanos=123456000),
        updated_at=Timestamp(seconds=1706706000, nanos=123456000),
        email=normalise_email(message.email),
        full_name=message.full_name if message.HasField("full_name") else None,
        is_active=message.is_active if message.HasField("is_active") else True,
    )
    assert (values.get("hashed_password") or "") == message.hashed_password


@settings(deadline=None)
@given(message=post_messages)
def test_post_keeps_every_writable_field(message: PostMessage) -> None:
    """What is accepted is returned."""
    values = post_values(message)
    assume(values is not None)
    assert values is not None  # for mypy

    assert post_to_message(row_of(Post, {**GIVEN, **values})) == PostMessage(
        id=7,
        version=3,
        created_at=Timestamp(seconds=1706702400, nanos=123456000),
        updated_at=Timestamp(seconds=1706706000, nanos=123456000),
        author_id=message.author_id,
        title=message.title,
        content=message.content,
    )


@settings(deadline=None)
@given(messages=st.lists(user_messages, max_size=5))
async def test_bulk_users_are_validated_like_single_ones(messages: list[UserMessage]) -> None:
    """The same rows are accepted with the same values, and unset fields get defaults."""
    batch = await user_batch_from_messages(messages, BULK_WRITABLE, [])
    defaults = {**UNSET_TEXTS, "is_active": True, "hashed_password": None}

    alone = [user_values(message) for message in messages]
    assert [row not in batch.failures for row in range(batch.size)] == [
        values is not None for values in alone
    ]
    for row in batch.good_rows():
        values = {name: column[row] for name, column in batch.columns.items()}
        assert values == {**defaults, **(alone[row] or {})}


@settings(deadline=None)
@given(messages=st.lists(post_messages, max_size=5))
async def test_bulk_posts_are_validated_like_single_ones(messages: list[PostMessage]) -> None:
    """The same rows are accepted with the same values."""
    batch = await post_batch_from_messages(messages, ("author_id", "title", "content"), [])

    alone = [post_values(message) for message in messages]
    assert [row not in batch.failures for row in range(batch.size)] == [
        values is not None for values in alone
    ]
    for row in batch.good_rows():
        values = {name: column[row] for name, column in batch.columns.items()}
        assert values == {"author_email": None, **(alone[row] or {})}


def test_output_only_fields_are_ignored() -> None:
    """The database sets them."""
    user = UserMessage(id=1, email="a@b", version=9, created_at=Timestamp(seconds=1), posts=[PostMessage()])
    post = PostMessage(id=1, author_id=2, title="t", version=9, author=user, created_at=Timestamp(seconds=1))

    assert user_from_message(user) == {"email": "a@b"}
    assert post_from_message(post) == {"author_id": 2, "title": "t", "content": ""}


def test_reports_all_violations_of_a_user() -> None:
    """Each field by its path."""
    message = UserMessage(email="ada", full_name="x" * 256, password="x", hashed_password="x")

    with pytest.raises(InvalidField) as caught:
        user_from_message(message)
    assert [violation.field for violation in caught.value.violations] == [
        "user.email",
        "user.full_name",
        "user.hashed_password",
        "user.password",
    ]


def test_reports_all_violations_of_a_post() -> None:
    """Each field by its path."""
    with pytest.raises(InvalidField) as caught:
        post_from_message(PostMessage(author_id=0, author_email="a@b", title="", content="\0"))

    assert [violation.field for violation in caught.value.violations] == [
        "post.author_email",
        "post.author_id",
        "post.title",
        "post.content",
    ]


USER_CHANGES: list[tuple[UserMessage, list[str], dict[str, Any]]] = [
    (UserMessage(is_active=False), [], {"is_active": False}),
    (UserMessage(full_name=""), [], {"full_name": ""}),
    (UserMessage(email=" A@B"), [], {"email": "a@b"}),
    (UserMessage(password="secret"), [], {"password": "secret"}),
    (UserMessage(email="a@b", full_name="Ada"), ["full_name"], {"full_name": "Ada"}),
    (UserMessage(email="a@b"), ["full_name"], {"full_name": None}),
    (UserMessage(full_name="Ada"), ["full_name", "full_name"], {"full_name": "Ada"}),
    (UserMessage(hashed_password=HASH), ["hashed_password"], {"hashed_password": HASH}),
    (
        UserMessage(email="a@b", is_active=True),
        ["*"],
        {"email": "a@b", **UNSET_TEXTS, "is_active": True},
    ),
    (
        UserMessage(email="a@b", is_active=True, hashed_password=HASH),
        ["*"],
        {"email": "a@b", **UNSET_TEXTS, "is_active": True, "hashed_password": HASH},
    ),
]


@pytest.mark.parametrize(("message", "paths", "changes"), USER_CHANGES)
def test_update_of_user_writes_set_or_named_fields(
    message: UserMessage, paths: list[str], changes: dict[str, Any]
) -> None:
    """Only `full_name` can become null; `*` keeps the password if none is set."""
    assert user_changes_from_message(message, FieldMask(paths=paths)) == changes


@pytest.mark.parametrize(
    ("message", "paths", "field"),
    [
        (UserMessage(), [], "user"),
        (UserMessage(), ["email"], "user.email"),
        (UserMessage(), ["is_active"], "user.is_active"),
        (UserMessage(), ["password"], "user.password"),
        (UserMessage(), ["hashed_password"], "user.hashed_password"),
        (UserMessage(email="a@b"), ["*"], "user.is_active"),
        (UserMessage(is_active=True), ["*"], "user.email"),
        (UserMessage(password="x", hashed_password=HASH), [], "user.password"),
    ],
)
def test_update_of_user_needs_a_valid_field(message: UserMessage, paths: list[str], field: str) -> None:
    """A required field that is named and unset is refused; so are two passwords."""
    with pytest.raises(InvalidField) as caught:
        user_changes_from_message(message, FieldMask(paths=paths))
    assert [violation.field for violation in caught.value.violations] == [field]


POST_CHANGES: list[tuple[PostMessage, list[str], dict[str, Any]]] = [
    (PostMessage(title="t"), [], {"title": "t"}),
    (PostMessage(content=""), [], {"content": ""}),
    (PostMessage(title="t", author_id=9), [], {"title": "t"}),
    (PostMessage(title="t", content="c"), ["content"], {"content": "c"}),
    (PostMessage(title="t"), ["content"], {"content": ""}),
    (PostMessage(title="t"), ["*"], {"title": "t", "content": ""}),
]


def post_changes(message: PostMessage, paths: list[str]) -> Mapping[str, Any]:
    """Return what an update of a post writes."""
    message.id = 7
    return post_update_from_request(
        UpdatePostRequest(post=message, update_mask=FieldMask(paths=paths))
    ).changes


@pytest.mark.parametrize(("message", "paths", "changes"), POST_CHANGES)
def test_update_of_post_writes_set_or_named_fields(
    message: PostMessage, paths: list[str], changes: dict[str, Any]
) -> None:
    """Named and unset `content` becomes empty; the author is never written."""
    assert post_changes(message, paths) == changes


@pytest.mark.parametrize(
    ("message", "paths", "field"),
    [
        (PostMessage(author_id=9), [], "post"),
        (PostMessage(content="c"), ["title"], "post.title"),
        (PostMessage(content="c"), ["*"], "post.title"),
    ],
)
def test_update_of_post_needs_a_valid_field(message: PostMessage, paths: list[str], field: str) -> None:
    """A title that is named and unset is refused."""
    with pytest.raises(InvalidField) as caught:
        post_changes(message, paths)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_author_of_post_can_not_be_changed() -> None:
    """A mask that names it is refused."""
    with pytest.raises(InvalidMask):
        post_changes(PostMessage(author_id=9), ["author_id"])


def test_user_key_is_id_or_email() -> None:
    """Exactly one is required; the e-mail is normalised."""
    assert keys_from_request(GetUserRequest(id=7)) == (7, ())
    assert keys_from_request(GetUserRequest(email=" ADA@example.org")) == ("ada@example.org", [])
    for request in (
        GetUserRequest(),
        GetUserRequest(id=0),
        GetUserRequest(email=""),
        GetUserRequest(email="a"),
    ):
        with pytest.raises(InvalidField):
            keys_from_request(request)


USER = row_of(User, {"email": "a@b", "full_name": "Ada", "is_active": True, **GIVEN})
POST = row_of(Post, {"title": "t", "content": "c", "author_id": 7, **GIVEN})


def test_user_with_posts_has_posts_without_contents() -> None:
    """A user alone has none."""
    listed: Any = [value for name, value in zip(column_names(Post), POST, strict=True) if name != "content"]
    message = UserMessage(**user_with_posts_to_fields(UserWithPosts(USER, [listed])))

    (post,) = message.posts
    assert (post.id, post.title, post.author_id, post.version) == (7, "t", 7, 3)
    assert not post.HasField("content")
    assert not user_to_message(USER).posts


def test_post_with_author_has_author_without_posts() -> None:
    """A post alone has none."""
    row: Any = (*POST, *USER)
    message = PostMessage(**post_with_author_to_fields(row))

    assert message.author == user_to_message(USER)
    assert not post_to_message(POST).HasField("author")
