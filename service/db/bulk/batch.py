"""The rows of one message as columns, the options to write them with, and their outcome."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, TypeAlias

from roster.errors import RosterError
from service.db.base import KeyValue

BatchColumns: TypeAlias = Mapping[str, Sequence[Any]]  # values by row, for each column


class OnConflict(Enum):
    """The action for a new row whose unique key another row has; the values are the contract's."""

    FAIL = 0
    SKIP = 1
    UPDATE = 2


@dataclass(frozen=True)
class WriteOptions:
    """How to write the batches of a load."""

    on_conflict: OnConflict = OnConflict.FAIL
    is_atomic: bool = False  # one failed row fails the batch
    validate_only: bool = False
    restores: bool = False  # rows may bring their ids, times and versions
    update_fields: Sequence[str] = ()  # the fields that the update mask names
    skips_missing: bool = False  # a delete of a row that does not exist is skipped
    restricts: bool = False  # a row is not deleted together with others that refer to it

    def looks_up_first(self, batch: "Batch") -> bool:
        """Return whether to look up stored rows before writing. A load without conflicts need not."""
        return (
            batch.expects_conflicts
            or self.is_atomic
            or self.validate_only
            or self.on_conflict is OnConflict.UPDATE
        )

    def writes(self, batch: "Batch") -> bool:
        """Return whether a batch, once its failures are known, writes anything."""
        return not (self.validate_only or (self.is_atomic and batch.failures))


@dataclass
class Batch:
    """Rows 0 to `size` - 1 as columns. Rows in `failures` and in `deferred` are not written."""

    size: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    failures: dict[int, RosterError] = field(default_factory=dict)
    expects_conflicts: bool = False  # an earlier batch of the load, or an attempt at this one, met a conflict
    # Batches are written at the same time, but take turns to draw their ids, so that these rise in file
    # order, or to lock the rows that they delete.
    turn: asyncio.Event | None = None
    next_turn: asyncio.Event = field(default_factory=asyncio.Event)
    deferred: Collection[int] = ()  # rows whose unique key an earlier, uncommitted batch has

    def keys(self, names: Iterable[str]) -> dict[str, dict[KeyValue, int]]:
        """Return the values of good rows in each of these columns, with the first row of each."""
        rows = self.good_rows()
        keys = {}
        for name in names:
            if name in self.columns:
                values = self.take(name, rows)
                first_rows = dict(zip(values, rows, strict=True))
                if len(first_rows) < len(rows):  # backwards, so that the first row of several stays
                    first_rows = dict(zip(reversed(values), reversed(rows), strict=True))
                first_rows.pop(None, None)  # unset and null values are in conflict with none
                keys[name] = first_rows
        return keys

    async def wait_for_turn(self) -> None:
        """Wait until the batch before has drawn its ids or locked its rows."""
        if self.turn:
            await self.turn.wait()

    def fail(self, row: int, error: RosterError) -> None:
        """Fail a row; its first failure is the one reported."""
        self.failures.setdefault(row, error)

    def good_rows(self) -> Sequence[int]:
        """Return the rows to write, in file order."""
        if not (self.failures or self.deferred):
            return range(self.size)
        return [row for row in range(self.size) if row not in self.failures and row not in self.deferred]

    def take(self, name: str, rows: Sequence[int]) -> list[Any]:
        """Return some rows of a column."""
        column = self.columns[name]
        if rows == range(self.size):
            return column
        return [column[row] for row in rows]


class Result(IntEnum):
    """The result of one row."""

    FAILED = 0
    CREATED = 1
    UPDATED = 2
    SKIPPED = 3
    DELETED = 4


@dataclass
class Outcome:
    """The results of a batch: `results[i]` and `ids[i]` belong to row i. An id of 0 means none.

    `dependents[i]` is how many rows of another table were deleted together with row i; it is empty if none
    were.
    """

    results: bytes = b""
    ids: list[int] = field(default_factory=list)
    # If an atomic batch fails, all its rows fail, but only those that caused it are in here.
    failures: dict[int, RosterError] = field(default_factory=dict)
    dependents: list[int] = field(default_factory=list)

    @classmethod
    def of_failed_batch(cls, batch: Batch) -> "Outcome":
        """Return the outcome of a batch that fails as a whole."""
        return cls(bytes(batch.size), [0] * batch.size, batch.failures)

    created = property(lambda self: self.results.count(Result.CREATED))
    updated = property(lambda self: self.results.count(Result.UPDATED))
    skipped = property(lambda self: self.results.count(Result.SKIPPED))
    failed = property(lambda self: self.results.count(Result.FAILED))
    deleted = property(lambda self: self.results.count(Result.DELETED))
    deleted_posts = property(lambda self: sum(self.dependents))  # the contract's name for them

    def id_of(self, row: int) -> int:
        """Return the id of the stored row that has this row's key, whether this row created it or not."""
        return self.ids[row] or int(self.failures[row].facts["existing_id"])

    def part(self, start: int, end: int) -> "Outcome":
        """Return the outcome of some of the rows."""
        failures = {row - start: error for row, error in self.failures.items() if start <= row < end}
        return Outcome(self.results[start:end], self.ids[start:end], failures, self.dependents[start:end])

    def extend(self, other: "Outcome") -> None:
        """Append the outcome of the rows that follow."""
        size = len(self.ids)
        if self.dependents or other.dependents:
            for outcome in (self, other):
                outcome.dependents = outcome.dependents or [0] * len(outcome.ids)
            self.dependents += other.dependents
        self.results += other.results
        self.ids += other.ids
        self.failures.update((size + row, error) for row, error in other.failures.items())
