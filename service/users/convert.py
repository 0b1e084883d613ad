"""Users: messages <-> values. Pure functions; all checks of a request happen here."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from roster.errors import InvalidField, InvalidMask
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import Post as PostMessage, User as UserMessage
from roster.v1.users_pb2 import (
    CreateUserRequest,
    GetUserRequest,
    UpdateUserRequest,
    UserKey,
    VerifyPasswordRequest,
)
from service.bulk.builder import BatchBuilder
from service.db.base import Values, column_names
from service.db.bulk.batch import Batch, OnConflict
from service.db.selection import Row
from service.encoding import RowEncoder
from service.users.model import User
from service.users.newest_posts import LISTED_POST, UserWithPosts
from service.users.rules import (
    OPTIONAL_TEXTS,
    RULES,
    email_key_error,
    email_spellings,
    normalise_email,
    password_error,
)
from service.validation import ID_RULE, VERSION_RULE, Rule, check_choice, check_id, collect_violations
from service.wire import (
    Fields,
    Update,
    check_identity,
    is_set,
    masked_fields,
    require_changes,
    row_converter,
)

WRITABLE = tuple(RULES)
BULK_WRITABLE = tuple(field for field in WRITABLE if field != "password")
# The e-mail is the key by which a create finds the user to update.
WRITABLE_ON_CONFLICT = tuple(field for field in WRITABLE if field != "email")

USER_ENCODER = RowEncoder(column_names(User), UserMessage)
user_to_fields = row_converter(column_names(User), UserMessage)
_listed_post_to_fields = row_converter(LISTED_POST, PostMessage)


@dataclass(frozen=True)
class Creation:
    """The values of a new user, and what to do with one who has the e-mail; only UPDATE has update fields."""

    values: Values
    on_conflict: OnConflict
    update_fields: Collection[str] = ()

    def changes(self, stored: Values) -> Values | None:
        """Return what an update writes, given the values with a hash in place of a password."""
        if self.on_conflict is not OnConflict.UPDATE:
            return None
        columns = ("hashed_password" if name == "password" else name for name in self.update_fields)
        return {column: stored.get(column) for column in columns}


def user_to_message(row: Row) -> UserMessage:
    """Return a user as the API shows it."""
    return UserMessage(**user_to_fields(row))


def user_with_posts_to_fields(row: UserWithPosts) -> Fields:
    """Return a user and its posts as the fields of a message."""
    return {**user_to_fields(row.user), "posts": list(map(_listed_post_to_fields, row.posts))}


def user_from_message(message: UserMessage) -> Values:
    """Return the values of a new user, with a `password` not hashed yet; raises InvalidField."""
    optional = [field for field in WRITABLE if field != "email" and is_set(message, field)]
    return _values(message, ["email", *optional])


def user_creation_from_request(request: CreateUserRequest) -> Creation:
    """Return a user to create, with a `password` not hashed yet; raises InvalidMask, InvalidField."""
    check_choice(request.on_conflict, BulkOptions.OnConflict, "on_conflict")
    on_conflict, values = OnConflict(request.on_conflict), user_from_message(request.user)
    if on_conflict is not OnConflict.UPDATE:
        if request.update_mask.paths:
            raise InvalidMask("update_mask must be empty unless on_conflict is UPDATE", field="update_mask")
        return Creation(values, on_conflict)
    if not request.update_mask.paths:
        named = ", ".join(WRITABLE_ON_CONFLICT)
        raise InvalidMask(f"update_mask is required with UPDATE; it may name {named}", field="update_mask")
    if request.user.version:
        # It would be ignored, and a caller who sends it expects it to be checked.
        message = "user.version can't be checked here; clear it, or update the user with UpdateUser"
        raise InvalidField(message, field="user.version")
    changes = user_changes_from_message(request.user, request.update_mask, WRITABLE_ON_CONFLICT)
    return Creation(values, on_conflict, changes.keys())


def user_update_from_request(request: UpdateUserRequest) -> Update:
    """Return the changes to a user, with a `password` not hashed yet; raises InvalidMask, InvalidField."""
    id, version = check_identity(request.user, "user")
    return Update(id, version, user_changes_from_message(request.user, request.update_mask))


def user_changes_from_message(
    message: UserMessage, mask: FieldMask, writable: Sequence[str] = WRITABLE
) -> Values:
    """Return the values that an update writes; raises InvalidMask, InvalidField."""
    fields = masked_fields(message, mask, writable)
    if list(mask.paths) == ["*"]:
        # `password` and `hashed_password` write the same column: `*` means the one that is set, if any.
        fields = [field for field in fields if "password" not in field or is_set(message, field)]
    require_changes(fields, "user", "email, full_name or is_active")
    return _values(message, fields)


async def user_batch_from_messages(
    messages: Sequence[UserMessage], fields: Collection[str], masked: Collection[str]
) -> Batch:
    """Return the fields of rows as columns; a row that breaks a rule is in `failures`.

    A row needs every field that the update mask names, except optional texts, which are null if unset.
    """
    builder = BatchBuilder(messages)
    await builder.add_identity(fields)
    if "email" in fields:
        await builder.add("email", builder.values("email"), RULES["email"], normalise=normalise_email)
    for field in OPTIONAL_TEXTS:
        if field in fields:
            await builder.add(field, builder.set_values(field), RULES[field])
    if "is_active" in fields:
        default = None if "is_active" in masked else True
        states = builder.set_values("is_active", default)
        await builder.add("is_active", states, RULES["is_active"], is_required=True)
    if "hashed_password" in fields:
        await builder.add(
            "hashed_password",
            builder.values_or_none("hashed_password"),
            RULES["hashed_password"],
            is_required="hashed_password" in masked,
        )
    passwords = builder.values_or_none("password")
    if any(passwords):
        await builder.add("password", passwords, Rule(_bulk_password_error))
        del builder.batch.columns["password"]
    return builder.batch


async def user_keys_from_messages(
    messages: Sequence[UserKey],
    fields: Collection[str],  # noqa: ARG001
    masked: Collection[str],  # noqa: ARG001
) -> Batch:
    """Return the ids, e-mails and versions of users to delete; each row has an id or an e-mail."""
    builder = BatchBuilder(messages)
    ids, emails = builder.set_values("id"), builder.set_values("email")
    await builder.add("id", ids, ID_RULE)
    if any(email is not None for email in emails):
        await builder.add("email", emails, Rule(email_key_error), normalise=normalise_email)
    await builder.add("version", builder.values("version"), VERSION_RULE)
    if None in ids:
        for row, (id, email) in enumerate(zip(ids, emails, strict=True)):
            if id is None and email is None:
                builder.batch.fail(row, _key_missing())
    return builder.batch


def keys_from_request(
    request: GetUserRequest | VerifyPasswordRequest,
) -> tuple[int | str, Sequence[str]]:
    """Return the id or the e-mail of the user that a request names; raises InvalidField.

    With a normalised e-mail come the other texts under which an earlier release may have stored it.
    """
    key = request.WhichOneof("key")
    if key is None:
        raise _key_missing()
    if key == "id":
        return check_id(request.id), ()
    email, *others = email_spellings(request.email)
    with collect_violations() as violations:
        violations.add("email", email_key_error(email))
    return email, others


def password_from_request(request: VerifyPasswordRequest) -> str:
    """Return the password to verify; raises InvalidField."""
    with collect_violations() as violations:
        violations.add("password", password_error(request.password))
    return request.password


def _values(message: UserMessage, fields: Sequence[str]) -> Values:
    values = {field: _value(message, field) for field in fields}
    with collect_violations() as violations:
        for field, value in values.items():
            violations.add(f"user.{field}", _error(field, value))
        if "password" in values and "hashed_password" in values:
            violations.add("user.password", "can't come together with hashed_password")
    return values


def _value(message: UserMessage, field: str) -> Any:
    if field == "email":
        return normalise_email(message.email)
    return getattr(message, field) if is_set(message, field) else None


def _error(field: str, value: Any) -> str | None:
    if value is not None:
        return RULES[field].error(value)
    return None if field in OPTIONAL_TEXTS else "is required where update_mask names it"


def _key_missing() -> InvalidField:
    return InvalidField("id or email is required", field="id")


def _bulk_password_error(password: str) -> str:  # noqa: ARG001
    return "can't be loaded in bulk; send hashed_password"
