"""Users: message <-> values. Pure; the rules of a user's fields are applied here."""

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.resources_pb2 import User as UserMessage
from roster.v1.users_pb2 import GetUserRequest, VerifyPasswordRequest
from service.bulk.convert import add_identity
from service.db.bulk.batch import Batch
from service.errors import InvalidField
from service.posts.model import Post
from service.users.hashes import wrong_password_hash
from service.users.model import User
from service.validation import (
    Violations,
    are_plain_emails,
    are_texts,
    checking,
    is_set,
    masked_fields,
    normalise_email,
    timestamp,
    wrong_email,
    wrong_full_name,
    wrong_id,
    wrong_password,
)

WRITABLE = ("email", "full_name", "is_active", "password", "hashed_password")
columns_of = attrgetter("id", "email", "full_name", "is_active", "created_at", "updated_at", "version")
BULK_WRITABLE = ("email", "full_name", "is_active", "hashed_password")
RULES = {
    "email": wrong_email,
    "full_name": wrong_full_name,
    "password": wrong_password,
    "hashed_password": wrong_password_hash,
}


def user_to_message(user: User, *, with_posts: bool = False) -> UserMessage:
    """Return a stored user as the API shows it."""
    return UserMessage(**(with_posts_fields(user) if with_posts else user_fields(columns_of(user))))


def with_posts_fields(user: User) -> dict[str, Any]:
    """Return a stored user with its posts as the fields of its message."""
    return {**user_fields(columns_of(user)), "posts": list(map(_listed_post_fields, user.posts))}


def user_fields(row: Iterable[Any]) -> Any:
    """Return a user's columns, as a repository or a reader returns them, as the fields of its message.

    An answer makes its messages of them; to make each first and then copy it takes 1.6 times as long.
    """
    id, email, full_name, is_active, created_at, updated_at, version, *_ = row
    return {
        "id": id,
        "email": email,
        "full_name": full_name,
        "is_active": is_active,
        "created_at": timestamp(created_at),
        "updated_at": timestamp(updated_at),
        "version": version,
    }


def user_from_message(message: UserMessage) -> dict[str, Any]:
    """Return the values of a new user, `password` still in clear; raises InvalidField."""
    return _values(message, ["email", *(field for field in WRITABLE[1:] if is_set(message, field))])


def user_changes_from_message(message: UserMessage, mask: FieldMask) -> dict[str, Any]:
    """Return what an update writes, `password` still in clear; raises InvalidMask, InvalidField."""
    fields = masked_fields(message, mask, WRITABLE)
    if list(mask.paths) == ["*"]:  # two ways to write one thing
        fields = [field for field in fields if "password" not in field or is_set(message, field)]
    if not fields:
        raise InvalidField("user has nothing to change; set email, full_name or is_active", field="user")
    return _values(message, fields)


def user_batch_from_messages(
    messages: Sequence[UserMessage], fields: Collection[str], masked: Collection[str]
) -> Batch:
    """Return the fields of rows as columns; a row that breaks a rule is in `failures`.

    A row needs every field that the update mask names, but full_name, which is null where it is unset.
    """
    batch = Batch(len(messages))
    add_identity(batch, messages, fields)
    if "email" in fields:
        emails = [message.email for message in messages]
        is_plain = are_plain_emails(emails)
        batch.add(
            "email",
            emails if is_plain else list(map(normalise_email, emails)),
            wrong_email,
            is_sound=is_plain,
        )
    if "full_name" in fields:
        # Only where a field reads as its default it has to be asked whether it was set.
        names = [
            name if (name := message.full_name) or message.HasField("full_name") else None
            for message in messages
        ]
        batch.add("full_name", names, wrong_full_name, is_sound=are_texts(names))
    if "is_active" in fields:
        default = None if "is_active" in masked else True
        active = [
            is_active if (is_active := message.is_active) or message.HasField("is_active") else default
            for message in messages
        ]
        batch.add("is_active", active, is_required=True)
    if "hashed_password" in fields:
        hashes = [message.hashed_password or None for message in messages]
        is_required = "hashed_password" in masked
        batch.add(
            "hashed_password",
            hashes,
            wrong_password_hash,
            is_required=is_required,
            is_sound=not any(hashes),
        )
    if any(message.password for message in messages):
        batch.add("password", [message.password or None for message in messages], _wrong_in_bulk)
        del batch.columns["password"]
    return batch


def key_from_message(request: GetUserRequest | VerifyPasswordRequest) -> str | int:
    """Return the id, or the normalised e-mail, that a request looks a user up by; raises InvalidField."""
    if request.WhichOneof("key") is None:
        raise InvalidField("id or email is required", field="id")
    with checking() as violations:
        if request.HasField("id"):
            violations.add("id", wrong_id(request.id))
            return request.id
        email = normalise_email(request.email)
        violations.add("email", wrong_email(email))
        return email


def check_password(password: str) -> None:
    """Raise InvalidField for what can't be anybody's password."""
    with checking() as violations:
        violations.add("password", wrong_password(password))


def _values(message: UserMessage, fields: Sequence[str]) -> dict[str, Any]:
    values = {field: getattr(message, field) if is_set(message, field) else None for field in fields}
    if "email" in values:
        values["email"] = normalise_email(message.email)
    with checking() as violations:
        for field, value in values.items():
            violations.add(f"user.{field}", _wrong(field, value))
        _one_password(values, violations)
    return values


def _wrong(field: str, value: Any) -> str | None:
    if value is None:
        return None if field == "full_name" else "is required where update_mask names it"
    return RULES[field](value) if field in RULES else None


def _one_password(values: dict[str, Any], violations: Violations) -> None:
    if "password" in values and "hashed_password" in values:
        violations.add("user.password", "can't come together with hashed_password")


def _wrong_in_bulk(password: str) -> str:  # noqa: ARG001
    return "can't be loaded in bulk; send hashed_password"


def _listed_post_fields(post: Post) -> dict[str, Any]:
    return {
        "id": post.id,
        "title": post.title,
        "author_id": post.author_id,
        "created_at": timestamp(post.created_at),
        "updated_at": timestamp(post.updated_at),
        "version": post.version,
    }
