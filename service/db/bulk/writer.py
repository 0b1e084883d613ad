"""BulkWriter: writes the batches of any entity, on either database.

    create: resolve references -> look up stored keys -> plan -> insert, update -> outcome
    update: lock the rows                             -> plan -> update         -> outcome
    delete: look up stored keys, lock the rows        -> plan -> delete         -> outcome

A batch of a load that has met no conflict skips the look-up and writes at once, under a savepoint. If
that fails, or if another writer's commit comes between the look-up and the write, the attempt is rolled
back and made again, with a look-up.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from roster.errors import DatabaseUnavailable, IdTaken
from service.db.answers import erase_answers_about, exclude_references, prepare_cascade
from service.db.base import Column, KeyValue, Session, model_of, now
from service.db.bulk import postgresql, sqlite
from service.db.bulk.batch import Batch, BatchColumns, OnConflict, Outcome, Result, WriteOptions
from service.db.bulk.plan import DeletePlan, StoredKey, UniqueValues, plan_creates, plan_deletes, plan_updates
from service.db.bulk.table import BulkTable, OtherSpellings, Reference, UniqueKey, no_spellings
from service.db.deletion import count_dependents, delete_dependents, delete_rows, ids_with_dependents
from service.db.dialect import ids_of, is_sqlite
from service.db.distribution import is_distributed
from service.db.locks import KEY_SHARE, UPDATE, lock_rows, type_of
from service.timeslice import TimeSlice

MAX_RETRIES = 3


class LookupNeeded(Exception):
    """The batch can't be written without a look-up of stored rows first."""


class BulkWriter:
    """Writes batches of one entity in the session's transaction."""

    def __init__(self, session: Session, table: BulkTable) -> None:
        self.session = session
        self.table = table
        self.model = table.model
        self._dialect = sqlite if is_sqlite(session) else postgresql
        self._drawn_ids: Sequence[int] = ()

    async def create(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Insert the rows of a batch; one whose unique key is taken fails, is skipped, or updates the row."""
        return await self.retry_on_conflict(batch, partial(self._create, options=options))

    async def update(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Update stored rows by id, as if in file order."""
        return await self.retry_on_conflict(batch, partial(self._update, options=options))

    async def delete(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Delete stored rows by id or a unique key, as if in file order, and their dependents.

        Raises TooLarge if these are too many.
        """
        batch = replace(batch, failures=dict(batch.failures))
        # The batch before commits first. If it still waited for locks by then, this batch could hold a lock
        # for which a third transaction waits that has one of those: a deadlock that the database can't see.
        await batch.wait_for_turn()
        await prepare_cascade(self.session, self.model)
        plan = await self._plan_deletes(batch, options)
        if options.is_atomic and batch.failures:
            return Outcome.of_failed_batch(batch)
        deleted, counts = sorted(plan.deleted), Counter[int]()
        if not options.validate_only:
            await exclude_references(self.session, self.model, deleted)
            await self._check_restriction(deleted, options)
        if self.table.dependents and not options.restricts:
            handle = count_dependents if options.validate_only else delete_dependents
            counts = await handle(self.session, self.table.dependents.reference, deleted)
        if not options.validate_only:
            await erase_answers_about(self.session, self.model, deleted)  # locks all rows that refer to them
        batch.next_turn.set()
        if not options.validate_only:
            await delete_rows(self.session, self.model, deleted)
        return plan.outcome(batch, counts)

    async def reserve_ids(self, batch: Batch) -> None:
        """Keep other writers from drawing a batch's ids once this transaction, a short one, has committed."""
        if largest := max((id for id in batch.take("id", batch.good_rows()) if id), default=0):
            await self._dialect.reserve_ids(self.session, self.model, largest)

    async def retry_on_conflict(
        self, batch: Batch, attempt: Callable[[Batch], Awaitable[Outcome]]
    ) -> Outcome:
        """Return the outcome of an attempt; roll back and repeat it if another writer got in its way."""
        # Not `begin_nested`: it compiles both statements each time, 0.2 µs a row. A commit needs no RELEASE.
        connection = await self.session.connection()
        await connection.exec_driver_sql("SAVEPOINT attempt")
        for _ in range(1 + MAX_RETRIES):
            try:
                # Each attempt gets failures of its own: those of the last one may no longer be true.
                return await attempt(replace(batch, failures=dict(batch.failures)))
            except (IntegrityError, LookupNeeded):
                await connection.exec_driver_sql("ROLLBACK TO SAVEPOINT attempt")
                batch.expects_conflicts = True
        raise DatabaseUnavailable(
            "other writes keep conflicting with this batch; nothing was written, try again"
        )

    async def _create(self, batch: Batch, options: WriteOptions) -> Outcome:
        for reference in self.table.references:
            batch = await self._resolve(batch, reference)
        keys = await self._stored_keys(batch, options)
        plan = await plan_creates(batch, keys, options.on_conflict)
        if plan.repeated and len(keys) > 1 and not options.looks_up_first(batch):
            # A row that repeats one key of the batch is not inserted, so no error would show that it is
            # also in conflict with a stored row, by a key that comes first.
            raise LookupNeeded
        if options.is_atomic and batch.failures:
            return Outcome.of_failed_batch(batch)
        if options.validate_only:
            return plan.outcome(batch, options, [])
        ids = await self._insert(batch, plan.columns(batch, options), len(plan.inserted))
        await self._write_updates(batch, plan.updated, options.update_fields)
        return plan.outcome(batch, options, ids)

    async def _update(self, batch: Batch, options: WriteOptions) -> Outcome:
        changed_keys = self.table.unique_among(options.update_fields)
        if not (changed_keys or options.looks_up_first(batch)) and _ids_differ(batch):
            return await self._update_without_lookup(batch, options)
        # Lock the rows, then plan with the versions and unique values that they have now.
        columns = [key.column for key in changed_keys]
        ids = batch.take("id", batch.good_rows())
        rows = await lock_rows(self.session, self.model.id, ids, self.model.version, *columns)
        versions = {row[0]: row[1] for row in rows}
        unique = []
        for position, key in enumerate(changed_keys, 2):
            current = {row[0]: row[position] for row in rows}
            unique.append(await self._unique_values(batch, key, current))
        updates = await plan_updates(batch, versions, self.table.not_found, unique)
        if options.is_atomic and batch.failures:
            return Outcome.of_failed_batch(batch)
        await asyncio.sleep(0)  # planning 5,000 rows has just taken its time
        if not options.validate_only:
            await self._set_aside(unique, list(updates))
            await self._write_updates(batch, updates, options.update_fields)
        return _updated(batch)

    async def _update_without_lookup(self, batch: Batch, options: WriteOptions) -> Outcome:
        """Update all good rows of a batch, in id order, and count the rows that were there.

        Raises LookupNeeded if one of them does not exist, or has another version.
        """
        rows = sorted(batch.good_rows(), key=batch.columns["id"].__getitem__)
        ids, expected = batch.take("id", rows), batch.take("version", rows)
        columns = {field: batch.take(field, rows) for field in options.update_fields}
        checked = expected if any(expected) else None
        if ids and await self._write_rows(ids, columns, [1] * len(ids), checked) < len(ids):
            raise LookupNeeded
        return _updated(batch)

    async def _plan_deletes(self, batch: Batch, options: WriteOptions) -> DeletePlan:
        """Lock the rows that a batch names, and return which of them to delete."""
        restricted: set[int] = set()
        # Usually each row names another stored row, by id. To read them would take as long as to delete them.
        if await self._lock_each(batch):
            given = batch.columns["id"]
            if options.restricts:
                restricted = await self._ids_with_dependents(given)
            if not restricted:
                return DeletePlan(dict(zip(given, range(batch.size), strict=True)))
        ids, versions = await self._lock_stored_rows(batch)
        if options.restricts:
            restricted = await self._ids_with_dependents(list(versions))
        return await plan_deletes(batch, ids, versions, self.table, options, restricted)

    async def _check_restriction(self, ids: Sequence[int], options: WriteOptions) -> None:
        """Raise DatabaseUnavailable if rows have begun to refer to the ids since the deletion was planned.

        Only Citus lets them: there, the locks of the plan do not keep other servers from adding rows.
        """
        dependents = self.table.dependents
        is_affected = dependents and is_distributed(self.session, model_of(dependents.reference))
        if options.restricts and is_affected and await self._ids_with_dependents(ids):
            raise DatabaseUnavailable("rows now refer to those to delete; nothing was done, try again")

    async def _lock_each(self, batch: Batch) -> bool:
        """Lock the rows with the ids of a batch; return whether each exists and has the version expected."""
        ids, expected = batch.columns["id"], batch.columns["version"]
        is_named_by_id = not (batch.failures or self.table.unique_among(batch.columns.keys()))
        is_simple = is_named_by_id and len(set(ids)) == batch.size
        if not is_simple or is_distributed(self.session, self.model):
            return False
        locked: int = await self._dialect.lock_rows_by_id(self.session, self.model, ids, expected)
        return locked == batch.size

    async def _ids_with_dependents(self, ids: Sequence[int]) -> set[int]:
        dependents = self.table.dependents
        return await ids_with_dependents(self.session, dependents.reference, ids) if dependents else set()

    async def _lock_stored_rows(self, batch: Batch) -> tuple[Sequence[int | None], Mapping[int, int]]:
        """Lock the rows that a batch names; return the id that each row names, and the versions by id."""
        ids = await self._named_ids(batch)
        for _ in range(1 + MAX_RETRIES):
            # In id order, whatever names the rows: so do loads of rows that refer to these.
            known = [ids[row] for row in batch.good_rows()]
            locked = await lock_rows(self.session, self.model.id, known, self.model.version, lock=UPDATE)
            versions = {row[0]: row[1] for row in locked}
            named, ids = ids, await self._named_ids(batch)
            # A row that was deleted or created meanwhile counts as missing: for a moment it was. But if
            # another row has its unique key now, there was no such moment.
            if all(id == now or id not in versions for id, now in zip(named, ids, strict=True)):
                return named, versions
        raise DatabaseUnavailable(
            "other writes keep conflicting with this batch; nothing was written, try again"
        )

    async def _named_ids(self, batch: Batch) -> Sequence[int | None]:
        """Return the id that each row of a batch names, None if it names no stored row."""
        keys = self.table.unique_among(batch.columns.keys())
        if not keys:
            return batch.columns["id"]
        ids = list(batch.columns["id"])
        for key in keys:
            found, values = await self._ids_by(key, batch), batch.columns[key.name]
            for row in batch.good_rows():
                if values[row] is not None:
                    ids[row] = found.get(values[row])
        return ids

    async def _resolve(self, batch: Batch, reference: Reference) -> Batch:
        """Return new rows with the ids of the rows that they refer to; fail those that refer to none.

        The other rows are not locked in a load that meets no conflicts. If one is deleted meanwhile, the
        foreign key raises an IntegrityError, and the next attempt locks them.
        """
        columns = dict(batch.columns)
        ids: list[int | None] = [None] * batch.size
        good, named = batch.good_rows(), {}
        for name, key in reference.keys.items():
            values = columns.pop(name)
            rows = [row for row in good if values[row]]
            given = [values[row] for row in rows]
            found = await ids_of(self.session, key, given, type_of(given))
            missing = [value for value, id in zip(given, found, strict=True) if id is None]
            spellings = reference.other_spellings.get(name, no_spellings)
            others = await self._ids_by_spelling(key, missing, spellings)
            for row, id in zip(rows, found, strict=True):
                ids[row] = id or others.get(values[row])
            named[name] = rows
        if batch.expects_conflicts:
            # In turn, as in a delete: it may be one that waits for this batch and for the next.
            await batch.wait_for_turn()
            await self._lock_references(key, ids)
        for name, rows in named.items():
            for row in rows:
                if ids[row] is None:
                    batch.fail(row, reference.missing_error(name))
        return replace(batch, columns=columns | {reference.column.key: ids})

    async def _lock_references(self, key: Column, ids: list[int | None]) -> None:
        """Lock rows of the table of `key`, so that they can't be deleted; replace ids without one by None."""
        existing = {row[0] for row in await lock_rows(self.session, key.class_.id, ids, lock=KEY_SHARE)}
        for row, id in enumerate(ids):
            if id not in existing:
                ids[row] = None

    async def _stored_keys(self, batch: Batch, options: WriteOptions) -> list[StoredKey]:
        """Return the keys to plan new rows by, with the stored rows that have one of the batch's values."""
        keys = list(self.table.unique)
        if options.restores:
            keys.insert(0, UniqueKey(self.model.id, id_taken))
        if not options.looks_up_first(batch):
            return [StoredKey(key, await self._ids_by_other_value(key, batch)) for key in keys]
        if options.on_conflict is OnConflict.UPDATE:
            return await self._lock_stored_keys(batch, keys)
        return [StoredKey(key, await self._ids_by(key, batch)) for key in keys]

    async def _lock_stored_keys(self, batch: Batch, keys: Sequence[UniqueKey]) -> list[StoredKey]:
        """Lock the rows that new ones may update. All in one statement: locks are taken in id order."""
        if len(keys) == 1:
            column = keys[0].column
            values = batch.take(keys[0].name, batch.good_rows())
            others = await _other_values(values, keys[0].other_spellings)
            rows = await lock_rows(self.session, column, [*values, *others], self.model.id)
            by_other = {others[value]: id for value, id in rows if value in others}
            by_value = {value: id for value, id in rows if value not in others}
            return [StoredKey(keys[0], by_other | by_value)]
        # With several keys: find the ids first, then read the values once the rows are locked.
        ids: set[int] = set()
        for key in keys:
            ids.update((await self._ids_by(key, batch)).values())
        columns = [key.column for key in keys]
        rows = await lock_rows(self.session, self.model.id, sorted(ids), *columns)
        stored = []
        for position, key in enumerate(keys, 1):
            ids_by_value = {row[position]: row[0] for row in rows if row[position] is not None}
            stored.append(StoredKey(key, ids_by_value))
        return stored

    async def _ids_by(self, key: UniqueKey, batch: Batch) -> dict[KeyValue, int]:
        """Return, by value, the ids of the rows that have one of the batch's values of a key."""
        values = [value for value in batch.take(key.name, batch.good_rows()) if value is not None]
        values.sort()  # one after the other they are in the same pages of the index
        ids = await ids_of(self.session, key.column, values, type_of(values))
        found = {value: id for value, id in zip(values, ids, strict=True) if id is not None}
        return {**await self._ids_by_other_value(key, batch), **found}

    async def _ids_by_other_value(self, key: UniqueKey, batch: Batch) -> dict[KeyValue, int]:
        """Return, by value, the ids of the rows that are stored under another spelling of a batch's value."""
        if key.other_spellings is no_spellings:
            return {}
        values = [value for value in batch.take(key.name, batch.good_rows()) if value is not None]
        return await self._ids_by_spelling(key.column, values, key.other_spellings)

    async def _ids_by_spelling(
        self, column: Column, values: Sequence[KeyValue], other_spellings: OtherSpellings
    ) -> dict[KeyValue, int]:
        others = await _other_values(values, other_spellings)
        stored = list(others)
        ids = await ids_of(self.session, column, stored, type_of(stored))
        return {others[other]: id for other, id in zip(stored, ids, strict=True) if id is not None}

    async def _unique_values(
        self, batch: Batch, key: UniqueKey, current: Mapping[int, KeyValue | None]
    ) -> UniqueValues:
        return UniqueValues(key, batch.columns[key.name], current, await self._ids_by(key, batch))

    async def _insert(self, batch: Batch, columns: BatchColumns, size: int) -> Sequence[int]:
        if not size:
            return []
        ids = await self._draw_ids(batch, columns.get("id"), size)
        rows = {**columns, "id": ids, **await self._restored_times(columns)}
        sort_by = self.table.sort_by
        await self._dialect.insert_rows(self.session, self.model, rows, sort_by.key if sort_by else None)
        return ids

    async def _draw_ids(self, batch: Batch, given: Sequence[int | None] | None, size: int) -> Sequence[int]:
        """Return the ids of new rows: their own if they are restored, otherwise new ones, in file order."""
        missing = size if given is None else given.count(None)
        # An attempt that was rolled back has drawn ids; the next one uses them.
        if len(self._drawn_ids) < missing:
            await batch.wait_for_turn()
            self._drawn_ids = await self._dialect.next_ids(self.session, self.model, missing)
            batch.next_turn.set()
        if given is None:
            return self._drawn_ids[:size]
        rest = iter(self._drawn_ids)
        return [id or next(rest) for id in given]

    async def _restored_times(self, columns: BatchColumns) -> BatchColumns:
        """Return the times of restored rows, with the transaction's own for rows that have none."""
        restored = {name: columns[name] for name in ("created_at", "updated_at") if name in columns}
        if not any(None in column for column in restored.values()):
            return restored
        at = (await self.session.execute(select(now()))).scalar_one()
        for name, column in restored.items():
            restored[name] = [time or at for time in column]
        return restored

    async def _set_aside(self, unique: Sequence[UniqueValues], ids: list[int]) -> None:
        """Give rows placeholders, so that the update can give the values they had to others of them."""
        columns = {}
        for values in unique:
            if values.has_moves:
                columns[values.key.name] = [values.key.placeholder(id) for id in ids]
        if columns:
            await self._write_rows(ids, columns, [0] * len(ids))

    async def _write_updates(
        self, batch: Batch, updates: Mapping[int, list[int]], fields: Sequence[str]
    ) -> None:
        """Update stored rows in id order, each to the last row that updates it."""
        if not updates:
            return
        ids = sorted(updates)
        last = [updates[id][-1] for id in ids]
        columns = {field: batch.take(field, last) for field in fields}
        await self._write_rows(ids, columns, [len(updates[id]) for id in ids])

    async def _write_rows(
        self,
        ids: Sequence[int],
        columns: BatchColumns,
        increments: Sequence[int],
        expected: Sequence[int] | None = None,
    ) -> int:
        updated: int = await self._dialect.update_rows(
            self.session, self.model, ids, columns, increments=increments, expected=expected
        )
        return updated


async def _other_values(
    values: Sequence[KeyValue | None], other_spellings: OtherSpellings
) -> dict[KeyValue, KeyValue]:
    """Return the value by each other value under which a row may be stored that has it."""
    if other_spellings is no_spellings:
        return {}
    others: dict[KeyValue, KeyValue] = {}
    time_slice = TimeSlice()
    for other, value in other_spellings(values):
        others[other] = value
        await time_slice.pause()
    return others


def id_taken(existing_id: int | None) -> IdTaken:
    """Return the error for an id that another row has."""
    facts = {"existing_id": existing_id} if existing_id else {}
    return IdTaken("id belongs to another row", field="id", **facts)


def _ids_differ(batch: Batch) -> bool:
    ids = batch.take("id", batch.good_rows())
    return len(set(ids)) == len(ids)


def _updated(batch: Batch) -> Outcome:
    results, ids = bytearray([Result.UPDATED]) * batch.size, list(batch.columns["id"])
    for row in batch.failures:
        results[row], ids[row] = Result.FAILED, 0
    return Outcome(bytes(results), ids, batch.failures)
