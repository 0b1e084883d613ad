"""The filter of a mirror, applied to rows of the file by the same SQL that the server uses."""

from collections.abc import Mapping
from typing import TypeAlias

from sqlalchemy import ColumnElement, Table

from roster.errors import InvalidFilter
from service.cli.mirror.difference import Difference
from service.db import filters
from service.users.repository import UserRepository

Conditions: TypeAlias = Mapping[Table, ColumnElement[bool]]

FIELDS = ("email", "full_name", "is_active")


async def row_conditions(text: str, difference: Difference, *, deactivates: bool) -> Conditions:
    """Return the conditions on the users to update and to create, by their list; raises InvalidFilter.

    The server decides which users match. Whether a row of the file will match depends on the row, and for
    fields that the file does not have, on the user as it is. Ids and times of new users are not known yet.
    """
    fields = [*FIELDS, "id"] if difference.key == "id" else [*FIELDS]
    if deactivates:
        fields.remove("is_active")
    conditions: dict[Table, ColumnElement[bool]] = {}
    for table in (difference.updates, difference.creates):
        columns = {name: table.c[name] for name in fields}
        try:
            condition = await filters.condition(
                text, columns, UserRepository.normalise, UserRepository.spellings
            )
        except InvalidFilter as error:
            raise InvalidFilter(
                f"{error.message}{_reason(error, deactivates=deactivates)}", field="filter"
            ) from None
        if condition is not None:
            conditions[table] = condition
    return conditions


def _reason(error: InvalidFilter, *, deactivates: bool) -> str:
    if "unknown field" not in error.message:
        return ""
    if deactivates:
        return " with --mirror --deactivate, so that users who come back to the file are found"
    return " with --mirror, which applies the filter to rows of the file too"
