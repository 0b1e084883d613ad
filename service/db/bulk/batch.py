"""The rows of one message as columns, how they are to be written, and what became of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
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
    update_fields: Sequence[str] = ()  # what the update mask names


@dataclass
class Batch:
    """Rows 0 to `size` - 1 as columns; the rows in `failures` are not to be written."""

    size: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    failures: dict[int, RosterError] = field(default_factory=dict)

    def add(
        self,
        name: str,
        values: list[Any],
        rule: Callable[[Any], str | None] | None = None,
        *,
        is_required: bool = False,
    ) -> None:
        """Add a column and fail the rows that break its rule; None is a value not given."""
        self.columns[name] = values
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

    def good_rows(self) -> list[int]:
        """Return the rows that have not failed, in file order."""
        return [row for row in range(self.size) if row not in self.failures]

    def take(self, name: str, rows: Sequence[int]) -> list[Any]:
        """Return some rows of a column."""
        column = self.columns[name]
        return [column[row] for row in rows]


@dataclass
class Outcome:
    """What became of a batch: `ids[i]` belongs to row i, 0 where it failed."""

    ids: list[int]
    failures: dict[int, RosterError]
    created: int = 0
    updated: int = 0
    skipped: int = 0
    failed: int = 0

    @classmethod
    def of_failed_batch(cls, batch: Batch) -> "Outcome":
        """Return the outcome of a batch that fails as a whole, for the rows that are to blame."""
        return cls(ids=[0] * batch.size, failures=batch.failures, failed=batch.size)
