"""The rows of one message as columns, how they are to be written, and what became of them."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from service.errors import InvalidField, RosterError


class OnConflict(Enum):
    """What happens to a row whose key is taken; the values are the contract's."""

    FAIL = 0
    SKIP = 1
    UPDATE = 2


@dataclass(frozen=True)
class WriteOptions:
    """How the batches of a load are written."""

    on_conflict: OnConflict = OnConflict.FAIL
    is_atomic: bool = False  # one failed row fails the batch
    validate_only: bool = False
    restores: bool = False  # rows may bring their ids, times and versions
    update_fields: Sequence[str] = ()  # what the update mask names

    def asks_first(self, batch: "Batch") -> bool:
        """Tell whether to ask which keys are taken before writing; a load without trouble need not."""
        return (
            batch.expects_conflicts
            or self.is_atomic
            or self.validate_only
            or self.on_conflict is OnConflict.UPDATE
        )

    def writes(self, batch: "Batch") -> bool:
        """Tell whether anything of a batch that is sorted out is written."""
        return not (self.validate_only or (self.is_atomic and batch.failures))


@dataclass
class Batch:
    """Rows 0 to `size` - 1 as columns; the rows in `failures` are not to be written."""

    size: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    failures: dict[int, RosterError] = field(default_factory=dict)
    expects_conflicts: bool = False  # the load met a key that is taken
    # Batches are written at the same time and draw their ids one after the other: ids rise in file order.
    draws_after: asyncio.Event | None = None
    has_drawn: asyncio.Event = field(default_factory=asyncio.Event)

    awaited: Collection[int] = ()  # rows that are left out: an earlier batch has their keys

    def extend(self, other: "Batch") -> None:
        """Append the rows of another batch, which has the same columns."""
        for name, values in other.columns.items():
            self.columns.setdefault(name, []).extend(values)
        self.failures.update((self.size + row, error) for row, error in other.failures.items())
        self.size += other.size

    def keys(self) -> dict[Any, int]:
        """Return the ids and e-mails of the good rows, each with the first row that has it."""
        rows = self.good_rows()[::-1]  # so that the first of several comes last, and stays
        found: dict[Any, int] = {}
        for name in ("id", "email"):
            if name in self.columns:
                found.update(zip(self.take(name, rows), rows, strict=True))
        found.pop(None, None)
        return found

    def add(
        self,
        name: str,
        values: list[Any],
        rule: Callable[[Any], str | None] | None = None,
        *,
        is_required: bool = False,
        is_sound: bool = False,
    ) -> None:
        """Add a column and fail the rows that break its rule; None is a value not given.

        A column that was found sound as a whole is not looked at row by row.
        """
        self.columns[name] = values
        if (is_sound or not rule) and not (is_required and None in values):
            return
        for row, value in enumerate(values):
            if value is None:
                wrong = "is required where update_mask names it" if is_required else None
            else:
                wrong = rule(value) if rule else None
            if wrong:
                self.fail(row, InvalidField(f"{name} {wrong}", field=name))

    def fail(self, row: int, error: RosterError) -> None:
        """Fail a row; its first failure is the one told."""
        self.failures.setdefault(row, error)

    def good_rows(self) -> Sequence[int]:
        """Return the rows that have not failed, in file order."""
        if not (self.failures or self.awaited):
            return range(self.size)
        return [row for row in range(self.size) if row not in self.failures and row not in self.awaited]

    def take(self, name: str, rows: Sequence[int]) -> list[Any]:
        """Return some rows of a column."""
        column = self.columns[name]
        return column if rows == range(self.size) else [column[row] for row in rows]


class Result(IntEnum):
    """What became of one row."""

    FAILED = 0
    CREATED = 1
    UPDATED = 2
    SKIPPED = 3


@dataclass
class Outcome:
    """What became of the rows of a batch: `results[i]` and `ids[i]` belong to row i; no id is 0."""

    results: bytes = b""
    ids: list[int] = field(default_factory=list)
    failures: dict[int, RosterError] = field(default_factory=dict)  # with is_atomic only of the culprits

    @classmethod
    def of_failed_batch(cls, batch: Batch) -> "Outcome":
        """Return the outcome of a batch that fails as a whole, for the rows that are to blame."""
        return cls(bytes(batch.size), [0] * batch.size, batch.failures)

    created = property(lambda self: self.results.count(Result.CREATED))
    updated = property(lambda self: self.results.count(Result.UPDATED))
    skipped = property(lambda self: self.results.count(Result.SKIPPED))
    failed = property(lambda self: self.results.count(Result.FAILED))

    def id_of(self, row: int) -> int:
        """Return the id of the stored row that has this row's key, put there by this row or not."""
        return self.ids[row] or int(self.failures[row].facts["existing_id"])

    def part(self, start: int, end: int) -> "Outcome":
        """Return the outcome of some of the rows."""
        failures = {row - start: error for row, error in self.failures.items() if start <= row < end}
        return Outcome(self.results[start:end], self.ids[start:end], failures)

    def extend(self, other: "Outcome") -> None:
        """Append the outcome of the rows that follow."""
        size = len(self.ids)
        self.results += other.results
        self.ids += other.ids
        self.failures.update((size + row, error) for row, error in other.failures.items())
