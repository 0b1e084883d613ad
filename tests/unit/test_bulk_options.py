"""Validation of the options of a bulk stream."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.bulk_pb2 import BulkOptions
from service.bulk.operation import Operation, StreamOptions
from service.errors import InvalidMask, InvalidOptions
from service.posts.servicer import CREATE_POSTS, UPDATE_POSTS
from service.users.servicer import CREATE_USERS, UPDATE_USERS

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


@pytest.mark.parametrize(("operation", "options"), UNWRITABLE)
def test_refuses_masks_with_fields_that_are_not_writable(operation: Operation, options: BulkOptions) -> None:
    """An output-only field, a password in clear, a post's author, the key itself."""
    with pytest.raises(InvalidMask):
        StreamOptions.from_message(options, operation)
