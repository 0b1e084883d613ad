"""Rows of the file, and users of the server, as values that can be compared. Pure functions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from roster.errors import InvalidField
from roster.v1.resources_pb2 import User
from service.users.rules import OPTIONAL_TEXTS, RULES, are_plain_emails, email_key_error, normalise_email
from service.validation import id_error


class FileRow(NamedTuple):
    """A row of the file. `number` is that of its line.

    `problem` is why the row can't update a user, and `create_problem` why it can't create one; a user that
    needs no change is not affected by either.
    """

    number: int
    id: int | None
    email: str | None
    full_name: str | None
    is_active: bool
    hashed_password: str | None
    problem: str | None
    create_problem: str | None


class StoredUser(NamedTuple):
    """A user that matches the filter, with the e-mail in its normal form."""

    id: int
    version: int
    email: str
    full_name: str | None
    is_active: bool


def row_from_message(number: int, message: User, key: str) -> FileRow:
    """Return a row with its key checked and its e-mail normalised; raises InvalidField.

    As in a load that creates users, an unset `is_active` is true.
    """
    if message.password:
        raise InvalidField("password can't be loaded in bulk; use hashed_password", field="password")
    email = normalise_email(message.email) or None
    error = email_key_error(email or "") if key == "email" or email else None
    if error:
        raise InvalidField(f"email {error}", field="email")
    if key == "id" and (error := id_error(message.id)):
        raise InvalidField(f"id {error}" if message.id else "id is required", field="id")
    values = {
        "email": email,
        "full_name": message.full_name if message.HasField("full_name") else None,
        "hashed_password": message.hashed_password or None,
    }
    updated = [*OPTIONAL_TEXTS] if key == "email" else ["email", *OPTIONAL_TEXTS]
    is_active = message.is_active if message.HasField("is_active") else True
    create_problem = _problem(values, values) if email else "email is required for a new user"
    return FileRow(
        number,
        message.id if key == "id" else None,
        **values,
        is_active=is_active,
        problem=_problem(values, updated),
        create_problem=create_problem,
    )


def users_from_columns(columns: Mapping[str, Sequence[Any]]) -> list[StoredUser]:
    """Return the users of an export. Earlier releases stored some e-mails in another form."""
    emails = columns["email"]
    if not are_plain_emails(emails):
        emails = list(map(normalise_email, emails))
    return list(
        map(
            StoredUser,
            *(columns["id"], columns["version"], emails, columns["full_name"], columns["is_active"]),
        )
    )


def compared_columns(found: Collection[str], key: str, *, deactivates: bool) -> list[str]:
    """Return the columns that are compared and updated: those of the file except its key.

    With `deactivates`, that includes `is_active`: users who are in the file are active.
    """
    columns = [name for name in StoredUser._fields if name in found and name not in (key, "id", "version")]
    if deactivates and "is_active" not in columns:
        columns.append("is_active")
    return columns


def _problem(values: Mapping[str, str | None], names: Iterable[str]) -> str | None:
    """Return the first rule that a value breaks."""
    for name in names:
        value = values[name]
        if value is not None and (error := RULES[name].error(value)):
            return f"{name} {error}"
    return None
