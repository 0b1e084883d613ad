"""Rows as wire bytes, compared with the bytes that protobuf writes for messages."""

from collections.abc import Sequence
from operator import mul
from random import Random
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings, strategies as st

from roster.v1.posts_pb2 import ExportPostsResponse, ListPostsResponse
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import BatchGetUsersResponse, ExportUsersResponse, ListUsersResponse
from service.db.base import column_names
from service.encoding import RowEncoder
from service.posts import model as posts
from service.users import model as users
from service.validation import MAX_ID
from service.wire import MAX_SECONDS, MIN_SECONDS, row_converter

USER = column_names(users.User)
POST = column_names(posts.Post)
NOON = 1_706_702_400_123_456  # microseconds since 1970
FIRST, LAST = MIN_SECONDS * 1_000_000, MAX_SECONDS * 1_000_000 + 999_999

ids = st.integers(1, MAX_ID) | st.integers(1, 300)
texts = st.text(max_size=300) | st.sampled_from(
    ["", "ada@example.org", "x" * 127, "x" * 128, "é" * 64, "\0", "😀"]
)
moments = (
    st.integers(FIRST, LAST)
    | st.integers(NOON, NOON + 10**9)
    | st.sampled_from(
        [FIRST, LAST, NOON, -1, 0, 1, 999_999, 1_000_000, 268_435, 268_436, (1 << 28) * 1_000_000]
    )
)
COLUMNS = {
    **dict.fromkeys(("id", "version", "author_id"), ids),
    **dict.fromkeys(("email", "title"), texts),
    **dict.fromkeys(("full_name", "content"), st.none() | texts),
    "is_active": st.sampled_from([None, False, True, 0, 1]),
    **dict.fromkeys(("created_at", "updated_at"), moments),
}
user_rows = st.tuples(*[COLUMNS[name] for name in USER])
post_rows = st.tuples(*[COLUMNS[name] for name in POST])


def as_message(message: type[Message], names: Sequence[str], row: Sequence[Any]) -> Message:
    return message(**row_converter(names, message)(row))


@settings(deadline=None)
@given(rows=st.lists(user_rows) | st.builds(mul, st.lists(user_rows, max_size=3), st.just(5)))
def test_writes_users_as_protobuf_does(rows: list[Any]) -> None:
    """To the byte, in a response with other fields."""
    messages = [as_message(User, USER, row) for row in rows]
    rest = BatchGetUsersResponse(missing_ids=[1, MAX_ID])
    response = BatchGetUsersResponse(users=messages, missing_ids=rest.missing_ids)  # type: ignore[arg-type]

    assert RowEncoder(USER, User).response(rows, rest) == response.SerializeToString()


@settings(deadline=None)
@given(rows=st.lists(post_rows) | st.builds(mul, st.lists(post_rows, max_size=3), st.just(5)))
def test_writes_posts_as_protobuf_does(rows: list[Any]) -> None:
    """Each of them with a content, which is long in some."""
    messages = [as_message(Post, POST, row) for row in rows]
    response = ListPostsResponse(posts=messages, next_page_token="é")  # type: ignore[arg-type]

    assert (
        RowEncoder(POST, Post).response(rows, ListPostsResponse(next_page_token="é"))
        == response.SerializeToString()
    )


@settings(deadline=None)
@given(row=user_rows, random=st.randoms(use_true_random=False))
def test_order_of_columns_does_not_matter(row: tuple[Any, ...], random: Random) -> None:
    """Fields are written in the order of their numbers; further columns are ignored."""
    positions = random.sample(range(len(USER)), random.randint(1, len(USER)))
    names = [USER[position] for position in positions]
    shuffled = [row[position] for position in positions]

    encoded = RowEncoder(names, User).response([[*shuffled, "another column"]], ListUsersResponse())

    response = ListUsersResponse(users=[as_message(User, names, shuffled)])  # type: ignore[list-item]
    assert encoded == response.SerializeToString()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 16_383, 16_384, 1 << 20])
@pytest.mark.parametrize("character", ["x", "é", "😀"])
def test_writes_texts_of_any_length(character: str, size: int) -> None:
    """Their length is a varint of one to three bytes, and counts bytes."""
    row = (7, "t" * (size % 256), character * size, 1, NOON, NOON, 1)
    message = as_message(Post, POST, row)

    assert RowEncoder(POST, Post).response([row], ExportPostsResponse(last_id=7)) == (
        ExportPostsResponse(posts=[message], last_id=7).SerializeToString()  # type: ignore[list-item]
    )


@pytest.mark.parametrize("bits", range(64))
def test_writes_integers_of_any_size(bits: int) -> None:
    """Negative ones too, alone and among others."""
    numbers = {(1 << bits) - 1, (1 << bits) % (1 << 63), -(1 << bits)}

    for ids in [*([number] for number in numbers), [*numbers], [*numbers] * 3]:
        expected = ListUsersResponse(users=[User(id=number) for number in ids])
        encoded = RowEncoder(["id"], User).response([[number] for number in ids], ListUsersResponse())
        assert encoded == expected.SerializeToString()


def test_missing_values_are_unset() -> None:
    """Every field, also those without presence, alone and among others."""
    encoder = RowEncoder(USER, User)
    full = (7, "ada@example.org", "Ada", True, NOON, NOON, 1)
    missing = [None] * len(USER)
    user = as_message(User, USER, full)

    response = encoder.response([missing, full], ListUsersResponse())

    assert encoder.response([missing], ListUsersResponse()) == b"\n\0"
    assert response == ListUsersResponse(users=[User(), user]).SerializeToString()  # type: ignore[list-item]


def test_page_without_rows_has_the_other_fields() -> None:
    """Only them."""
    assert RowEncoder(USER, User).response([], ExportUsersResponse(last_id=7)) == b"\x10\x07"


@pytest.mark.parametrize("field", ["posts", "author"])
def test_refuses_fields_of_other_types(field: str) -> None:
    """When the encoder is made, so the server does not start."""
    message = User if field == "posts" else Post
    with pytest.raises(TypeError, match=f"roster.v1.{message.__name__}.{field} has a type"):
        RowEncoder(["id", field], message)
