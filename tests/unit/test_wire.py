"""Field masks, Timestamps, and the requests that all entities have in common."""

from datetime import UTC, datetime

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings, strategies as st

from roster.errors import InvalidField, InvalidMask
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import ExportUsersRequest
from service.wire import (
    EPOCH,
    MICROSECOND,
    export_from_request,
    is_set,
    mask_paths,
    masked_fields,
    row_converter,
    timestamp_fields,
)

WRITABLE = ("email", "full_name", "is_active")
moments = st.datetimes(timezones=st.just(UTC))


def test_knows_which_fields_are_set() -> None:
    """An empty text is set if the field has presence, otherwise it is not."""
    user = User(email="", full_name="", is_active=False)

    assert [is_set(user, field) for field in WRITABLE] == [False, True, True]
    assert [is_set(User(email="a@b"), field) for field in WRITABLE] == [True, False, False]
    assert is_set(Post(content=""), "content")


def test_update_without_mask_writes_the_fields_that_are_set() -> None:
    """Nothing else."""
    assert masked_fields(User(is_active=False), FieldMask(), WRITABLE) == ["is_active"]
    assert masked_fields(User(), FieldMask(), WRITABLE) == []


def test_update_with_mask_writes_the_fields_in_the_mask() -> None:
    """Set or not, each once; `*` stands for every field."""
    user = User(email="ada@example.org")

    mask = FieldMask(paths=["full_name", "email", "full_name"])
    assert masked_fields(user, mask, WRITABLE) == ["full_name", "email"]
    assert masked_fields(user, FieldMask(paths=["*"]), WRITABLE) == list(WRITABLE)


@pytest.mark.parametrize(
    "paths", [["id"], ["email", "posts"], ["posts.title"], [""], ["*", "email"], ["nme"]]
)
def test_rejects_paths_that_can_t_be_written(paths: list[str]) -> None:
    """The error lists the paths that can be."""
    with pytest.raises(InvalidMask, match="it may name email, full_name, is_active"):
        mask_paths(FieldMask(paths=paths), WRITABLE)


@settings(deadline=None)
@given(moment=moments)
def test_converts_times_to_timestamps(moment: datetime) -> None:
    """To the microsecond, in all years from 1 to 9999, from a datetime and from microseconds."""
    microseconds = (moment - EPOCH) // MICROSECOND

    assert Timestamp(**timestamp_fields(moment)).ToDatetime(UTC) == moment
    assert timestamp_fields(microseconds) == timestamp_fields(moment)


def test_converts_rows_by_the_names_of_their_columns() -> None:
    """In any order of the columns; columns after those of the message are ignored."""
    to_fields = row_converter(("email", "created_at", "id"), User)

    assert User(**to_fields(("ada@example.org", 1_500_000, 7, "another column"))) == User(
        id=7, email="ada@example.org", created_at=Timestamp(seconds=1, nanos=500_000_000)
    )


@pytest.mark.parametrize(("batch_size", "rows"), [(0, 1000), (1, 1), (1000, 1000)])
def test_exports_1000_rows_a_message_by_default(batch_size: int, rows: int) -> None:
    """A request may ask for 1 to 1000."""
    request = ExportUsersRequest(after_id=7, batch_size=batch_size)

    assert export_from_request(request) == (7, rows)


def test_reports_all_violations_of_an_export() -> None:
    """Both numbers are out of range."""
    with pytest.raises(InvalidField) as caught:
        export_from_request(ExportUsersRequest(after_id=-1, batch_size=1001))

    assert [violation.field for violation in caught.value.violations] == ["after_id", "batch_size"]
