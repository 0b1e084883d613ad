"""Rows in file order -> sets: what one statement can insert, and what one can update.

The result is as if the rows were applied one after the other; a statement that met a key twice
would fail (INSERT) or apply one of them in silence (UPDATE). Pure: the database is asked before.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.db.bulk.batch import Batch, OnConflict, Outcome, Result, WriteOptions
from service.errors import RosterError, VersionMismatch
from service.timeslice import slices


@dataclass
class Creates:
    """A batch of new rows, by what happens to each."""

    inserted: Sequence[int] = ()  # rows, in file order
    amended: dict[int, list[int]] = field(default_factory=dict)  # inserted row -> later rows that update it
    updated: dict[int, list[int]] = field(default_factory=dict)  # stored id -> rows that update it
    skipped: dict[int, int] = field(default_factory=dict)  # row -> stored id, for those skipped
    repeated: dict[int, int] = field(default_factory=dict)  # row -> the inserted row that has its key

    def columns(self, batch: Batch, options: WriteOptions) -> dict[str, list[Any]]:
        """Return the columns to insert, later updates of the same key applied."""
        columns = {name: batch.take(name, self.inserted) for name in batch.columns}
        if self.amended:
            columns["version"] = [1 + len(self.amended.get(row, ())) for row in self.inserted]
            for name in options.update_fields:
                last = [self.amended.get(row, [row])[-1] for row in self.inserted]
                columns[name] = batch.take(name, last)
        return columns

    def outcome(self, batch: Batch, options: WriteOptions, new_ids: Sequence[int]) -> Outcome:
        """Return what became of each row; `new_ids` are the inserted rows', none where none was written."""
        if len(new_ids) == batch.size:  # nothing but new rows
            return Outcome(bytes([Result.CREATED]) * batch.size, list(new_ids))
        results, ids = bytearray(batch.size), [0] * batch.size
        for row, id in zip(self.inserted, new_ids or [0] * len(self.inserted), strict=True):
            results[row], ids[row] = Result.CREATED, id
        for id, rows in self.updated.items():
            for row in rows:
                results[row], ids[row] = Result.UPDATED, id
        for row, id in self.skipped.items():
            results[row], ids[row] = Result.SKIPPED, id
        for row, first in self.repeated.items():
            if options.on_conflict is not OnConflict.FAIL:
                skips = options.on_conflict is OnConflict.SKIP
                results[row], ids[row] = Result.SKIPPED if skips else Result.UPDATED, ids[first]
            elif ids[first]:
                batch.failures[row].facts["existing_id"] = ids[first]
        return Outcome(bytes(results), ids, batch.failures)


@dataclass(frozen=True)
class Key:
    """A unique column: who has which of the batch's values, and the error for one that is taken."""

    column: str
    stored: Mapping[Any, int]
    taken: Callable[[int | None], RosterError]


async def resolve_creates(batch: Batch, keys: Sequence[Key], on_conflict: OnConflict) -> Creates:
    """Sort out the good rows of a batch by their unique keys; a row without a value for one meets nothing."""
    if _all_differ(batch, keys):
        return Creates(inserted=range(batch.size))
    if len(keys) == 1:  # as nearly always; several keys take 1 µs a row more
        return await _resolve_by(keys[0], batch, on_conflict)
    creates, inserted = Creates(), []
    first: dict[tuple[str, Any], int] = {}
    async for some in slices(batch.good_rows()):
        for row in some:
            values = [(key, value) for key in keys if (value := batch.columns[key.column][row]) is not None]
            for key, value in values:
                if value in key.stored:
                    _on_stored(creates, batch, row, key, key.stored[value], on_conflict)
                    break
                if (key.column, value) in first:
                    _on_repeated(creates, batch, row, key, first[key.column, value], on_conflict)
                    break
            else:
                inserted.append(row)
                first.update(((key.column, value), row) for key, value in values)
    creates.inserted = inserted
    return creates


async def _resolve_by(key: Key, batch: Batch, on_conflict: OnConflict) -> Creates:
    creates = Creates()
    first: dict[Any, int] = {}
    values, is_stored = batch.columns[key.column], key.stored
    async for some in slices(batch.good_rows()):
        for row in some:
            value = values[row]
            if value in is_stored:
                _on_stored(creates, batch, row, key, is_stored[value], on_conflict)
            elif value in first:
                _on_repeated(creates, batch, row, key, first[value], on_conflict)
            else:
                first[(None, row) if value is None else value] = row  # a row that has none meets nothing
    creates.inserted = list(first.values())
    return creates


def _all_differ(batch: Batch, keys: Sequence[Key]) -> bool:
    if batch.failures or batch.awaited or any(key.stored for key in keys):
        return False
    return all(len(set(batch.columns[key.column])) == batch.size for key in keys)


def _on_stored(creates: Creates, batch: Batch, row: int, key: Key, id: int, on_conflict: OnConflict) -> None:
    if on_conflict is OnConflict.FAIL:
        batch.fail(row, key.taken(id))
    elif on_conflict is OnConflict.SKIP:
        creates.skipped[row] = id
    else:
        creates.updated.setdefault(id, []).append(row)


def _on_repeated(
    creates: Creates, batch: Batch, row: int, key: Key, first: int, on_conflict: OnConflict
) -> None:
    creates.repeated[row] = first
    if on_conflict is OnConflict.FAIL:
        batch.fail(row, key.taken(None))
    elif on_conflict is OnConflict.UPDATE:
        creates.amended.setdefault(first, []).append(row)


async def resolve_updates(
    batch: Batch,
    versions: Mapping[int, int],
    missing: Callable[[], RosterError],
    refusal: Callable[[int, int], RosterError | None] = lambda row, id: None,  # noqa: ARG005
) -> dict[int, list[int]]:
    """Return, by id, the rows that update it, in file order; the last of them wins.

    `versions` has the stored version of each id there is. `refusal(row, id)` is asked last, and in
    file order, so that it may keep count of what earlier rows changed.
    """
    await asyncio.sleep(0)  # 5,000 rows were read just now
    updates: dict[int, list[int]] = {}
    current = dict(versions)
    ids, expected = batch.columns["id"], batch.columns["version"]
    async for some in slices(batch.good_rows()):
        for row in some:
            id = ids[row]
            if id not in current:
                batch.fail(row, missing())
            elif expected[row] not in (0, current[id]):
                batch.fail(row, _outdated(current[id]))
            elif error := refusal(row, id):
                batch.fail(row, error)
            else:
                current[id] += 1
                updates.setdefault(id, []).append(row)
    return updates


def _outdated(version: int) -> RosterError:
    return VersionMismatch(f"the version is {version} by now", field="version", version=version)
