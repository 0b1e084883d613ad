"""The options of a mirror."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import click

LIMIT = re.compile(r"([0-9]{1,18})|([0-9]{1,3}(?:\.[0-9]{1,6})?)%", re.ASCII)
ALL_PERCENT = 100


class DeleteLimit(NamedTuple):
    """A number of users, or a percentage of those who could be deleted. `text` is as it was written."""

    text: str
    number: int | None
    percentage: Decimal = Decimal()

    def allows(self, deletes: int, removable: int) -> bool:
        """Return whether this number of the users who could be deleted may be."""
        if self.number is not None:
            return deletes <= self.number
        return ALL_PERCENT * deletes <= self.percentage * removable


class DeleteLimitType(click.ParamType[DeleteLimit]):
    """A number such as 500, or a percentage such as 2.5%."""

    name = "N or N%"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> DeleteLimit:
        if isinstance(value, DeleteLimit):
            return value
        found = LIMIT.fullmatch(value.strip())
        if found is None:
            self.fail(
                f"{value} is not a number of users such as 500, or a percentage such as 2.5%", param, ctx
            )
        number, percentage = found.groups()
        if number is not None:
            return DeleteLimit(value, int(number))
        if Decimal(percentage) > ALL_PERCENT:
            self.fail(f"{value} is more than 100%", param, ctx)
        return DeleteLimit(value, None, Decimal(percentage))


def check_filter(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """Refuse a blank filter, such as that of an unset variable of the shell: it would match everybody."""
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty; leave out the option to mirror all users", context, parameter)
    return value or ""


@dataclass(frozen=True)
class MirrorOptions:
    """The options of a mirror."""

    key: str
    filter: str
    limit: DeleteLimit
    batch_rows: int
    deactivates: bool
    is_dry_run: bool
