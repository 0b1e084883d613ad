"""Plans of a batch: rows in file order -> sets of rows that one statement can insert or update.

The result is the same as if the rows were applied one after the other. They are not, and a single
statement that met a key twice would fail (INSERT) or silently apply only one of the rows (UPDATE).
The functions here are pure: the writer looks up stored rows before.
"""

import asyncio
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roster.errors import RosterError, VersionMismatch
from service.db.base import KeyValue
from service.db.bulk.batch import Batch, BatchColumns, OnConflict, Outcome, Result, WriteOptions
from service.db.bulk.table import BulkTable, UniqueKey
from service.timeslice import slices


@dataclass
class CreatePlan:
    """The rows of a batch of new rows, by what to do with each."""

    inserted: Sequence[int] = ()  # rows, in file order
    amended: dict[int, list[int]] = field(default_factory=dict)  # inserted row -> later rows that update it
    updated: dict[int, list[int]] = field(default_factory=dict)  # stored id -> rows that update it
    skipped: dict[int, int] = field(default_factory=dict)  # skipped row -> stored id
    repeated: dict[int, int] = field(default_factory=dict)  # row -> the inserted row that has its key

    def columns(self, batch: Batch, options: WriteOptions) -> BatchColumns:
        """Return the columns to insert, with later updates of the same rows applied."""
        columns = {name: batch.take(name, self.inserted) for name in batch.columns}
        if self.amended:
            columns["version"] = [1 + len(self.amended.get(row, ())) for row in self.inserted]
            for name in options.update_fields:
                last = [self.amended.get(row, [row])[-1] for row in self.inserted]
                columns[name] = batch.take(name, last)
        return columns

    def outcome(self, batch: Batch, options: WriteOptions, new_ids: Sequence[int]) -> Outcome:
        """Return the results; `new_ids` are those of the inserted rows, empty if nothing was written."""
        if len(new_ids) == batch.size:  # all rows are new
            return Outcome(bytes([Result.CREATED]) * batch.size, list(new_ids))
        results, ids = bytearray(batch.size), [0] * batch.size
        for row, id in zip(self.inserted, new_ids or [0] * len(self.inserted), strict=True):
            results[row], ids[row] = Result.CREATED, id
        for id, rows in self.updated.items():
            for row in rows:
                results[row], ids[row] = Result.UPDATED, id
        for row, id in self.skipped.items():
            results[row], ids[row] = Result.SKIPPED, id
        # Last, as a repeated row has the id of the row that it repeats.
        for row, first in self.repeated.items():
            if options.on_conflict is OnConflict.SKIP:
                results[row], ids[row] = Result.SKIPPED, ids[first]
            elif options.on_conflict is OnConflict.UPDATE:
                results[row], ids[row] = Result.UPDATED, ids[first]
            elif ids[first]:
                batch.failures[row].facts["existing_id"] = ids[first]
        return Outcome(bytes(results), ids, batch.failures)


@dataclass(frozen=True)
class StoredKey:
    """A unique key, and the id of the stored row for each of the batch's values that is taken."""

    key: UniqueKey
    ids: Mapping[KeyValue, int]


async def plan_creates(batch: Batch, keys: Sequence[StoredKey], on_conflict: OnConflict) -> CreatePlan:
    """Sort the good rows of a batch by their conflicts; a null value is in conflict with none."""
    if _all_differ(batch, keys):
        return CreatePlan(inserted=range(batch.size))
    if len(keys) == 1:  # the common case; the general one takes 1 µs a row more
        return await _plan_by_one_key(batch, keys[0], on_conflict)
    return await _plan_by_keys(batch, keys, on_conflict)


async def _plan_by_one_key(batch: Batch, stored: StoredKey, on_conflict: OnConflict) -> CreatePlan:
    plan = CreatePlan()
    first: dict[KeyValue | tuple[None, int], int] = {}
    values, ids = batch.columns[stored.key.name], stored.ids
    async for some in slices(batch.good_rows()):
        for row in some:
            value = values[row]
            if value in ids:
                _meet_stored(plan, batch, row, stored.key, ids[value], on_conflict)
            elif value in first:
                _meet_new(plan, batch, row, stored.key, first[value], on_conflict)
            else:
                # A null value gets an entry of its own, which no value is equal to.
                first[(None, row) if value is None else value] = row
    plan.inserted = list(first.values())
    return plan


async def _plan_by_keys(batch: Batch, keys: Sequence[StoredKey], on_conflict: OnConflict) -> CreatePlan:
    plan, inserted = CreatePlan(), []
    # For each key, the rows to insert by their value. Rows that are not inserted take no values.
    tracked: list[tuple[StoredKey, list[Any], dict[KeyValue, int]]] = [
        (stored, batch.columns[stored.key.name], {}) for stored in keys
    ]
    async for some in slices(batch.good_rows()):
        for row in some:
            # The first key in conflict decides what the row meets.
            for stored, values, first in tracked:
                value = values[row]
                if value in stored.ids:
                    _meet_stored(plan, batch, row, stored.key, stored.ids[value], on_conflict)
                    break
                if value in first:
                    _meet_new(plan, batch, row, stored.key, first[value], on_conflict)
                    break
            else:
                inserted.append(row)
                for _, values, first in tracked:
                    if values[row] is not None:
                        first[values[row]] = row
    plan.inserted = inserted
    return plan


def _all_differ(batch: Batch, keys: Sequence[StoredKey]) -> bool:
    if batch.failures or batch.deferred or any(stored.ids for stored in keys):
        return False
    return all(len(set(batch.columns[stored.key.name])) == batch.size for stored in keys)


def _meet_stored(
    plan: CreatePlan, batch: Batch, row: int, key: UniqueKey, id: int, on_conflict: OnConflict
) -> None:
    if on_conflict is OnConflict.FAIL:
        batch.fail(row, key.conflict_error(id))
    elif on_conflict is OnConflict.SKIP:
        plan.skipped[row] = id
    else:
        plan.updated.setdefault(id, []).append(row)


def _meet_new(
    plan: CreatePlan, batch: Batch, row: int, key: UniqueKey, first: int, on_conflict: OnConflict
) -> None:
    plan.repeated[row] = first
    if on_conflict is OnConflict.FAIL:
        batch.fail(row, key.conflict_error(None))
    elif on_conflict is OnConflict.UPDATE:
        plan.amended.setdefault(first, []).append(row)


class UniqueValues:
    """The owner of each value of one unique column, as a batch's updates apply in file order.

    `current` has the value of each row to update, `stored` the owner of each wanted value that is taken.
    """

    def __init__(
        self,
        key: UniqueKey,
        wanted: Sequence[KeyValue | None],
        current: Mapping[int, KeyValue | None],
        stored: Mapping[KeyValue, int],
    ) -> None:
        self.key = key
        self.has_moves = False  # a value that one row had goes to another row of the batch
        self._wanted = wanted
        self._current = dict(current)
        # None as an owner: a row of this batch had the value, and has given it up.
        self._owners: dict[KeyValue | None, int | None] = dict(stored.items())
        self._owners.update((value, id) for id, value in current.items() if value is not None)

    def conflict(self, row: int, id: int) -> RosterError | None:
        """Return the error if another row has the value that this row wants for its id."""
        owner = self._owners.get(self._wanted[row])
        if owner in (None, id):
            return None
        return self.key.conflict_error(owner)

    def assign(self, row: int, id: int) -> None:
        """Give a stored row the value that this row of the batch wants for it."""
        value, previous = self._wanted[row], self._current[id]
        if value == previous:
            return
        if previous is not None:
            self._owners[previous] = None
        if value is not None:
            self.has_moves = self.has_moves or value in self._owners
            self._owners[value] = id
        self._current[id] = value


async def plan_updates(
    batch: Batch,
    versions: Mapping[int, int],
    not_found: Callable[[], RosterError],
    unique: Sequence[UniqueValues] = (),
) -> dict[int, list[int]]:
    """Return the rows that update each stored id, in file order; the last row wins.

    `versions` has the stored version of each id that exists.
    """
    await asyncio.sleep(0)  # reading 5,000 rows has just taken its time
    updates: dict[int, list[int]] = {}
    current = dict(versions)
    ids, expected = batch.columns["id"], batch.columns["version"]
    async for some in slices(batch.good_rows()):
        for row in some:
            id = ids[row]
            if id not in current:
                batch.fail(row, not_found())
            elif expected[row] not in (0, current[id]):
                batch.fail(row, VersionMismatch.of(current[id]))
            elif unique and (error := _first_conflict(unique, row, id)):
                batch.fail(row, error)
            else:
                # A row takes its values only if it keeps to all keys; then later rows see them taken.
                for values in unique:
                    values.assign(row, id)
                current[id] += 1
                updates.setdefault(id, []).append(row)
    return updates


@dataclass
class DeletePlan:
    """The rows of a batch of deletes, by what to do with each."""

    deleted: dict[int, int] = field(default_factory=dict)  # stored id -> row that deletes it
    skipped: list[int] = field(default_factory=list)

    def outcome(self, batch: Batch, dependents: Mapping[int, int]) -> Outcome:
        """Return the results; `dependents` has the number of rows deleted together with each id."""
        if len(self.deleted) == batch.size:
            counts = [dependents.get(id, 0) for id in self.deleted] if dependents else []
            return Outcome(bytes([Result.DELETED]) * batch.size, list(self.deleted), {}, counts)
        results, ids, counts = bytearray(batch.size), [0] * batch.size, [0] * batch.size
        for id, row in self.deleted.items():
            results[row], ids[row], counts[row] = Result.DELETED, id, dependents.get(id, 0)
        for row in self.skipped:
            results[row] = Result.SKIPPED
        return Outcome(bytes(results), ids, batch.failures, counts if dependents else [])


async def plan_deletes(
    batch: Batch,
    ids: Sequence[int | None],
    versions: Mapping[int, int],
    table: BulkTable,
    options: WriteOptions,
    restricted: Container[int] = (),
) -> DeletePlan:
    """Return which rows delete a stored row: `ids` has its id for each row of the batch.

    `versions` has the stored version of each id that exists, and `restricted` the ids that can't be deleted.
    The second of two rows for one stored row finds it deleted.
    """
    plan = DeletePlan()
    expected = batch.columns["version"]
    async for some in slices(batch.good_rows()):
        for row in some:
            id = ids[row]
            if id is None or id not in versions or id in plan.deleted:
                if options.skips_missing:
                    plan.skipped.append(row)
                else:
                    batch.fail(row, table.not_found())
            elif expected[row] not in (0, versions[id]):
                batch.fail(row, VersionMismatch.of(versions[id]))
            elif table.dependents and id in restricted:
                batch.fail(row, table.dependents.restriction())
            else:
                plan.deleted[id] = row
    return plan


def _first_conflict(unique: Sequence[UniqueValues], row: int, id: int) -> RosterError | None:
    for values in unique:
        if error := values.conflict(row, id):
            return error
    return None
