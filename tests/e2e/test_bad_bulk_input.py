"""Bad messages and bad rows in a bulk stream: each is reported in its ack, and the stream continues."""

from typing import Any
from uuid import uuid4

import pytest
from google.rpc.code_pb2 import ABORTED, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, OUT_OF_RANGE
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from roster.v1.bulk_pb2 import BulkLoad
from service.bulk.message import MAX_BYTES, MAX_ROWS
from service.validation import MAX_ID
from tests.support.bad_input import (
    BAD_CONTENTS,
    BAD_EMAILS,
    BAD_HASHES,
    BAD_NAMES,
    BAD_TITLES,
    HASH,
    INT64_MAX,
    INT64_MIN,
    SECRET,
)
from tests.support.wire import Wire

BAD_IDS = [0, -1, MAX_ID + 1, INT64_MIN, INT64_MAX]
USER_MASK = {"paths": ["email", "full_name", "is_active", "hashed_password"]}
POST_MASK = {"paths": ["title", "content"]}
# The field that has the rows, and the options that the operation needs.
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "BulkCreateUsers": ("users", {}),
    "BulkUpdateUsers": ("users", {"update_mask": USER_MASK}),
    "BulkCreatePosts": ("posts", {}),
    "BulkUpdatePosts": ("posts", {"update_mask": POST_MASK}),
}

BAD_FIELDS: dict[str, dict[str, list[Any]]] = {
    "BulkCreateUsers": {
        "email": [None, *BAD_EMAILS],
        "full_name": BAD_NAMES,
        "hashed_password": BAD_HASHES,
        "password": [SECRET],
    },
    "BulkUpdateUsers": {
        "id": BAD_IDS,
        "version": [-1, INT64_MIN],
        "email": [None, *BAD_EMAILS],
        "full_name": BAD_NAMES,
        "is_active": [None],
        "hashed_password": [None, *BAD_HASHES],
        "password": [SECRET],
    },
    "BulkCreatePosts": {
        "author_id": [None, *BAD_IDS],
        "author_email": [*BAD_EMAILS[2:], f"{SECRET}@example.org"],
        "title": [None, *BAD_TITLES],
        "content": BAD_CONTENTS,
    },
    "BulkUpdatePosts": {
        "id": BAD_IDS,
        "version": [-1, INT64_MIN],
        "title": [None, *BAD_TITLES],
        "content": BAD_CONTENTS,
    },
}
# Well-formed, but the database says no.
REFUSED_ROWS = [
    ("BulkUpdateUsers", {"id": MAX_ID}, NOT_FOUND, "USER_NOT_FOUND", ""),
    ("BulkUpdateUsers", {"version": INT64_MAX}, ABORTED, "VERSION_MISMATCH", "version"),
    ("BulkCreatePosts", {"author_id": MAX_ID}, FAILED_PRECONDITION, "AUTHOR_NOT_FOUND", "author_id"),
    (
        "BulkCreatePosts",
        {"author_id": None, "author_email": f"{SECRET}@example.org"},
        FAILED_PRECONDITION,
        "AUTHOR_NOT_FOUND",
        "author_email",
    ),
    ("BulkUpdatePosts", {"id": MAX_ID}, NOT_FOUND, "POST_NOT_FOUND", ""),
    ("BulkUpdatePosts", {"version": INT64_MAX}, ABORTED, "VERSION_MISMATCH", "version"),
]
BAD_ROWS = [
    pytest.param(rpc, {field: value}, INVALID_ARGUMENT, "INVALID_FIELD", field, id=f"{rpc}-{field}-{number}")
    for rpc, fields in BAD_FIELDS.items()
    for field, values in fields.items()
    for number, value in enumerate(values)
]


class Rows:
    """Builds valid rows."""

    def __init__(self, author_id: int, post_id: int) -> None:
        self.author_id = author_id
        self.post_id = post_id

    def good(self, rpc: str) -> dict[str, Any]:
        """Return a valid row for this RPC with a new e-mail."""
        email = f"{uuid4()}@example.org"
        user = {"email": email, "full_name": "Ada", "is_active": True, "hashed_password": HASH}
        return {
            "BulkCreateUsers": user,
            "BulkUpdateUsers": {"id": self.author_id, **user},
            "BulkCreatePosts": {"author_id": self.author_id, "title": "Notes"},
            "BulkUpdatePosts": {"id": self.post_id, "title": "More notes", "content": "..."},
        }[rpc]


@pytest.fixture
async def rows(wire: Wire) -> Rows:
    """Rows for an existing user and post."""
    (author,) = await wire.call("CreateUser", {"user": {"email": f"{uuid4()}@example.org"}})
    (post,) = await wire.call("CreatePost", {"post": {"author_id": author.id, "title": "Notes"}})
    return Rows(author.id, post.id)


@pytest.mark.parametrize(("rpc", "wrong", "code", "reason", "field"), [*BAD_ROWS, *REFUSED_ROWS])
async def test_bad_row_fails_alone(
    wire: Wire, rows: Rows, rpc: str, wrong: dict[str, Any], code: int, reason: str, field: str
) -> None:
    """The failure has code, reason, field and message; all other rows are written."""
    name, options = STREAMS[rpc]
    batch = [rows.good(rpc), {**rows.good(rpc), **wrong}, rows.good(rpc)]

    _, settled, summary = await wire.call(rpc, {"options": options, name: batch, "finish": True})

    (failure,) = settled.ack.failures
    assert (failure.offset, failure.code, failure.reason, failure.field) == (1, code, reason, field)
    assert 10 <= len(failure.message) <= 200
    assert SECRET not in failure.message
    assert (settled.ack.created + settled.ack.updated, settled.ack.failed) == (2, 1)
    assert (summary.summary.next_offset, summary.summary.failed) == (3, 1)


@pytest.mark.parametrize("rpc", STREAMS)
async def test_bad_message_is_refused_alone(wire: Wire, rows: Rows, rpc: str) -> None:
    """The ack has the error, and the stream stays open."""
    name, options = STREAMS[rpc]
    text = "email" if name == "users" else "content"
    bad: list[tuple[dict[str, Any], int, str, str]] = [
        ({name: [rows.good(rpc)] * (MAX_ROWS + 1)}, INVALID_ARGUMENT, "TOO_LARGE", name),
        ({name: [{text: SECRET + "x" * MAX_BYTES}]}, INVALID_ARGUMENT, "TOO_LARGE", name),
        ({name: [rows.good(rpc)], "offset": -1}, INVALID_ARGUMENT, "INVALID_FIELD", "offset"),
        ({name: [rows.good(rpc)], "offset": INT64_MIN}, INVALID_ARGUMENT, "INVALID_FIELD", "offset"),
        ({name: [rows.good(rpc)], "offset": INT64_MAX}, OUT_OF_RANGE, "OFFSET_GAP", ""),
        # Behind the one before, which no number says.
        ({name: [rows.good(rpc)]}, OUT_OF_RANGE, "OFFSET_GAP", ""),
        ({name: [rows.good(rpc)], "offset": 1}, OUT_OF_RANGE, "OFFSET_GAP", ""),
    ]
    sent = [{"options": options}, *(message for message, *_ in bad)]

    _, *acks, written, summary = await wire.call(
        rpc, *sent, {name: [rows.good(rpc)], "offset": 0, "finish": True}
    )

    expected = [(code, reason, field) for _, code, reason, field in bad]
    assert [error_of(answer.ack.error) for answer in acks] == expected
    assert [answer.ack.next_offset for answer in acks] == [0] * len(bad)
    assert not any(SECRET.encode() in answer.SerializeToString() for answer in acks)
    assert not written.ack.HasField("error")
    assert (summary.summary.next_offset, summary.summary.state) == (1, BulkLoad.FINISHED)


def error_of(error: Status) -> tuple[int, str, str]:
    """Return code, reason and field of an ack's error."""
    info, bad = ErrorInfo(), BadRequest()
    for detail in error.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return error.code, info.reason, bad.field_violations[0].field if bad.field_violations else ""
