"""The steps of a mirror: the loads that carry out its plan, and the rows that they send."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from secrets import token_hex
from typing import Any
from uuid import uuid4

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from sqlalchemy import Row, Table

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import UserKey
from service.cli.mirror.difference import Difference

# A domain that nobody can have: https://www.rfc-editor.org/rfc/rfc2606#section-2
PARKED = "@parked.invalid"


@dataclass(frozen=True)
class Step:
    """One load: the rows of a list, as messages of an RPC. `outcome` names their result."""

    outcome: str
    verb: str
    table: Table
    options: BulkOptions
    message: Callable[[Row[Any]], Message]

    @property
    def role(self) -> str:
        """The role that a caller needs."""
        if self.options.restore:
            return "admin"
        return "deleter" if self.outcome == "deleted" else "loader"

    @property
    def writes_emails(self) -> bool:
        """Whether rows get e-mails of the file."""
        return self.outcome == "created" or (
            self.outcome == "updated" and "email" in self.options.update_mask.paths
        )


def with_parked(filter_: str) -> str:
    """Return a filter that also finds the users whom an earlier run with this filter has left parked.

    They matched before they got another e-mail. Users parked under another filter may not be of this mirror.
    """
    return f'({filter_}) OR email = "{_parked_prefix(filter_)}*"'


def _parked_prefix(filter_: str) -> str:
    return f"mirror-{sha256(filter_.encode()).hexdigest()[:16]}-"


def steps(difference: Difference, columns: Sequence[str], filter_: str, *, deactivates: bool) -> list[Step]:
    """Return the steps in their order: e-mails are free before others get them.

    An update load writes its rows in batches, and an e-mail that a user of a later batch still has is taken.
    So users whose e-mails others get first are parked: they get another e-mail in between.
    """
    run = f"mirror-{uuid4().hex}"
    found = [_deactivations(difference, run) if deactivates else _deletes(difference, run)]
    if "email" in columns:
        found.append(_parks(difference, run, filter_))
    if columns:
        found.append(_updates(difference, run, columns))
    return [*found, _creates(difference, run)]


def _deletes(difference: Difference, run: str) -> Step:
    options = BulkOptions(load_id=f"{run}-delete", on_missing=BulkOptions.SKIP_MISSING)
    return Step(
        "deleted",
        "BulkDelete",
        difference.deletes,
        options,
        lambda row: UserKey(id=row.id, version=row.version),
    )


def _deactivations(difference: Difference, run: str) -> Step:
    def message(row: Row[Any]) -> User:
        return User(id=row.id, version=row.version, is_active=False)

    options = _update_options(f"{run}-deactivate", ["is_active"])
    return Step("deactivated", "BulkUpdate", difference.deletes, options, message)


def _parks(difference: Difference, run: str, filter_: str) -> Step:
    start, end = _parked_prefix(filter_), f"-{token_hex(8)}{PARKED}"

    def message(row: Row[Any]) -> User:
        return User(id=row.id, version=row.version, email=f"{start}{row.id}{end}")

    options = _update_options(f"{run}-park", ["email"])
    return Step("parked", "BulkUpdate", difference.parks, options, message)


def _updates(difference: Difference, run: str, columns: Sequence[str]) -> Step:
    def message(row: Row[Any]) -> User:
        return User(id=row.id, version=row.version, **{name: getattr(row, name) for name in columns})

    return Step(
        "updated", "BulkUpdate", difference.updates, _update_options(f"{run}-update", columns), message
    )


def _creates(difference: Difference, run: str) -> Step:
    is_restore = difference.key == "id"
    fields = ["email", "full_name", "is_active", "hashed_password"]
    if is_restore:
        fields.append("id")

    def message(row: Row[Any]) -> User:
        return User(**{name: getattr(row, name) for name in fields})

    options = BulkOptions(load_id=f"{run}-create", restore=is_restore)
    return Step("created", "BulkCreate", difference.creates, options, message)


def _update_options(load_id: str, paths: Sequence[str]) -> BulkOptions:
    return BulkOptions(load_id=load_id, update_mask=FieldMask(paths=paths))
