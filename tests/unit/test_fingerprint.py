"""The fingerprint by which a repeated request is recognised."""

from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import UpdateUserRequest
from service.idempotency import fingerprint

REQUEST = UpdateUserRequest(user=User(id=7, full_name="Ada"), update_mask=FieldMask(paths=["full_name"]))


def changed(**fields: str) -> UpdateUserRequest:
    """Return the request with other fields of its user."""
    request = UpdateUserRequest()
    request.CopyFrom(REQUEST)
    request.user.MergeFrom(User(**fields))  # type: ignore[arg-type]
    return request


def test_ignores_the_spelling_of_the_request_id() -> None:
    """One UUID can be written in several ways."""
    request = changed()
    request.request_id = "7D0F7C0E-1C43-4B5B-8D5C-2A4B4C1F6A10"

    assert fingerprint(request) == fingerprint(REQUEST)


def test_ignores_fields_marked_as_sensitive() -> None:
    """The contract marks `password` with `debug_redact`."""
    assert fingerprint(changed(password="secret")) == fingerprint(REQUEST)


def test_differs_for_any_other_field() -> None:
    """A hash of a password included, although the contract marks it too."""
    assert fingerprint(changed(full_name="Countess")) != fingerprint(REQUEST)
    assert fingerprint(changed(hashed_password="$argon2id$")) != fingerprint(REQUEST)
