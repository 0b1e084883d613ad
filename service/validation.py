"""Validation: the rules that all entities share, and the violations of a request.

A check is a function `x_error`. It returns None for a valid value, otherwise the end of a sentence that
begins with the name of the field. The sentence never repeats the value.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from roster.errors import InvalidField, TooLarge, Violation

Check = Callable[[Any], str | None]

# Fits a JavaScript number, and leaves room at both ends of int64.
MAX_ID = 2**53
MAX_IDS = 1000
MAX_EXPORT_BATCH = 1000
DEFAULT_COUNT = 10_000
MAX_COUNT = 1_000_000


def id_error(id: int) -> str | None:
    return None if 1 <= id <= MAX_ID else f"must be from 1 to {MAX_ID}"


def version_error(version: int) -> str | None:
    return None if version >= 0 else "must be 0, or the version last read"


def text_error(text: str, max_length: int) -> str | None:
    if len(text) > max_length:
        return f"is longer than {max_length:,} characters"
    return "must not contain NUL" if "\0" in text else None


def are_valid_texts(texts: Sequence[str | None], max_length: int) -> bool:
    """Return whether `text_error` accepts every text that is not None."""
    present = [text for text in texts if text]
    return not present or (len(max(present, key=len)) <= max_length and "\0" not in "".join(present))


def never_sure(values: Sequence[Any]) -> bool:  # noqa: ARG001
    """Have each value of a column checked."""
    return False


@dataclass(frozen=True)
class Rule:
    """The rule of a field: the check of one value, and a faster one of a column of values.

    `accepts_all` may refuse a column of valid values, which are then checked one by one. It never accepts a
    column with an invalid one. In a column, None stands for an unset value.
    """

    error: Check
    accepts_all: Callable[[Sequence[Any]], bool] = never_sure


def are_ids(values: Sequence[int | None]) -> bool:
    """Return whether `id_error` accepts every value that is not None."""
    ids = [value for value in values if value is not None]
    return not ids or (min(ids) >= 1 and max(ids) <= MAX_ID)


def are_versions(versions: Sequence[int]) -> bool:
    """Return whether `version_error` accepts every version."""
    return not versions or min(versions) >= 0


ID_RULE = Rule(id_error, are_ids)
VERSION_RULE = Rule(version_error, are_versions)


def text_rule(max_length: int) -> Rule:
    """Return the rule of a text of at most this many characters."""
    return Rule(partial(text_error, max_length=max_length), partial(are_valid_texts, max_length=max_length))


class Violations(list[Violation]):
    """The violations of one request, collected so that all are reported at once."""

    def add(self, field: str, error: str | None) -> None:
        """Add what a rule returned for a field; None adds nothing."""
        if error:
            self.append(Violation(field, f"{field} {error}"))


@contextmanager
def collect_violations() -> Iterator[Violations]:
    """Raise InvalidField at the end of the block if violations were added."""
    violations = Violations()
    yield violations
    if violations:
        raise InvalidField.of(violations)


def check_id(id: int, field: str = "id") -> int:
    """Return a valid id; raises InvalidField."""
    if error := id_error(id):
        raise InvalidField(f"{field} {error}", field=field)
    return id


def check_ids(ids: Sequence[int]) -> list[int]:
    """Return the ids of a batch in their order, without duplicates; raises InvalidField, TooLarge."""
    if len(ids) > MAX_IDS:
        raise TooLarge(f"ids has more than {MAX_IDS:,} entries; split them over several calls", field="ids")
    if not ids:
        raise InvalidField(f"ids is required: 1 to {MAX_IDS:,} ids", field="ids")
    if id_error(min(ids)) or id_error(max(ids)):
        with collect_violations() as violations:
            for position, id in enumerate(ids):
                violations.add(f"ids[{position}]", id_error(id))
    return list(dict.fromkeys(ids))


def check_version(version: int, field: str = "version") -> int:
    """Return the version that a write expects, 0 for any; raises InvalidField."""
    with collect_violations() as violations:
        violations.add(field, version_error(version))
    return version


def check_choice(number: int, enum: Any, field: str) -> None:
    """Raise InvalidField if the enum does not have this number."""
    if number not in enum.values():
        raise InvalidField(f"{field} must be one of {', '.join(enum.keys())}", field=field)
