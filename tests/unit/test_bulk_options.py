"""Validation of the options of a bulk stream."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from roster.errors import InvalidMask, InvalidOptions
from roster.v1.bulk_pb2 import BulkOptions
from service.bulk.operation import Operation, StreamOptions
from service.posts.servicer import CREATE_POSTS, DELETE_POSTS, UPDATE_POSTS
from service.users.servicer import CREATE_USERS, DELETE_USERS, UPDATE_USERS

UNFIT = [
    (UPDATE_USERS, BulkOptions(), "update_mask"),
    (UPDATE_POSTS, BulkOptions(), "update_mask"),
    (CREATE_USERS, BulkOptions(on_conflict=BulkOptions.UPDATE), "update_mask"),
    (CREATE_USERS, BulkOptions(update_mask=FieldMask(paths=["full_name"])), "update_mask"),
    (CREATE_POSTS, BulkOptions(update_mask=FieldMask(paths=["title"])), "update_mask"),
    (CREATE_POSTS, BulkOptions(on_conflict=BulkOptions.SKIP), "on_conflict"),
    (
        UPDATE_USERS,
        BulkOptions(on_conflict=BulkOptions.SKIP, update_mask=FieldMask(paths=["email"])),
        "on_conflict",
    ),
    (CREATE_USERS, BulkOptions(max_failures=-1), "max_failures"),
    (DELETE_USERS, BulkOptions(on_conflict=BulkOptions.SKIP), "on_conflict"),
    (DELETE_USERS, BulkOptions(update_mask=FieldMask(paths=["email"])), "update_mask"),
    (DELETE_USERS, BulkOptions(restore=True), "restore"),
    (DELETE_POSTS, BulkOptions(restrict=True), "restrict"),
    (CREATE_USERS, BulkOptions(restrict=True), "restrict"),
    (CREATE_USERS, BulkOptions(on_missing=BulkOptions.SKIP_MISSING), "on_missing"),
    (
        UPDATE_USERS,
        BulkOptions(on_missing=BulkOptions.SKIP_MISSING, update_mask=FieldMask(paths=["email"])),
        "on_missing",
    ),
]
UNWRITABLE = [
    (UPDATE_USERS, BulkOptions(update_mask=FieldMask(paths=["version"]))),
    (UPDATE_USERS, BulkOptions(update_mask=FieldMask(paths=["password"]))),
    (UPDATE_POSTS, BulkOptions(update_mask=FieldMask(paths=["author_id"]))),
    (CREATE_USERS, BulkOptions(on_conflict=BulkOptions.UPDATE, update_mask=FieldMask(paths=["email"]))),
]


@pytest.mark.parametrize(("operation", "options", "field"), UNFIT)
def test_refuses_options_that_do_not_fit_the_operation(
    operation: Operation, options: BulkOptions, field: str
) -> None:
    """The error names the option."""
    with pytest.raises(InvalidOptions) as caught:
        StreamOptions.from_message(options, operation)

    assert caught.value.field == f"options.{field}"


@pytest.mark.parametrize("operation", [CREATE_USERS, CREATE_POSTS, DELETE_USERS])
def test_suggests_updates_where_rows_can_be_in_conflict(operation: Operation) -> None:
    """Elsewhere `on_conflict` is refused too."""
    with pytest.raises(InvalidOptions) as caught:
        StreamOptions.from_message(BulkOptions(update_mask=FieldMask(paths=["title"])), operation)

    assert ("on_conflict" in caught.value.message) is (operation is CREATE_USERS)


@pytest.mark.parametrize(("operation", "options"), UNWRITABLE)
def test_refuses_masks_with_fields_that_are_not_writable(operation: Operation, options: BulkOptions) -> None:
    """An output-only field, a password in clear, a post's author, the key itself."""
    with pytest.raises(InvalidMask):
        StreamOptions.from_message(options, operation)
