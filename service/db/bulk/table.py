"""An entity as the bulk code sees it: its model, its unique keys, and the order to insert in."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from roster.errors import NotFound, RosterError
from service.db.base import Column, Entity, KeyValue


def random_text(id: int) -> str:
    """Return a text that no other row has, nor can a caller guess it and take it first."""
    return f"moving {id} {token_hex(8)}"


# From values of a key, each other value under which a row may be stored that has one of them, with that one.
# One by one, so that other callbacks can run in between.
OtherSpellings = Callable[[Sequence[Any]], Iterable[tuple[Any, Any]]]


def no_spellings(values: Sequence[Any]) -> Iterable[tuple[Any, Any]]:  # noqa: ARG001
    """Return none: each value is stored as it is."""
    return ()


@dataclass(frozen=True)
class UniqueKey:
    """A unique column, of texts or integers.

    `conflict_error` makes the error for a value that another row has, from that row's id if it is known.
    `placeholder` makes a value that no row has, from a row's id. When two rows swap their values, both get
    placeholders first. The default suits texts of 64 characters or more. `other_spellings` finds rows that an
    earlier release stored under other values.
    """

    column: Column
    conflict_error: Callable[[int | None], RosterError]
    placeholder: Callable[[int], KeyValue] = random_text
    other_spellings: OtherSpellings = no_spellings

    @property
    def name(self) -> str:
        """The name of the column."""
        return self.column.key


@dataclass(frozen=True)
class Reference:
    """A foreign key. A new row names the other row by the id or by another unique column of its table.

    `keys` maps columns of a batch to the unique columns that have their values; each row has a value in one
    of them. `missing_error` makes the error for a value that no row has, from the name of the batch's column.
    `other_spellings` are those of the unique columns, by the column of the batch.
    """

    column: Column
    keys: Mapping[str, Column]
    missing_error: Callable[[str], RosterError]
    other_spellings: Mapping[str, OtherSpellings] = field(default_factory=dict)


@dataclass(frozen=True)
class Dependents:
    """Rows of another table that are deleted together with the row that they refer to.

    `restriction` makes the error for a row that has some and is not to be deleted together with them.
    """

    reference: Column
    restriction: Callable[[], RosterError]


@dataclass(frozen=True)
class BulkTable:
    """All that the generic bulk code knows of an entity.

    A new row that has a value of another row in one of the `unique` keys is in conflict with it; with
    several such rows, the first key in this order decides. Rows are inserted in the order of `sort_by`, so
    that two batches with the same keys wait for each other instead of ending in a deadlock. A new row fails
    if a row that it refers to, by one of the `references`, does not exist. A row is deleted by its id or a
    unique key, together with its `dependents`.
    """

    model: type[Entity]
    not_found: Callable[[], NotFound]
    unique: Sequence[UniqueKey] = ()
    sort_by: Column | None = None
    references: Sequence[Reference] = ()
    dependents: Dependents | None = None

    def unique_among(self, fields: Collection[str]) -> list[UniqueKey]:
        """Return the unique keys among some columns."""
        return [key for key in self.unique if key.name in fields]
