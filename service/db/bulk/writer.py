"""How many rows are written at once: each database in its own way, behind one class."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Text, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.types import TypeEngine

from service.db.base import BigInt, Entity, now
from service.db.bulk import portable, postgresql
from service.db.bulk.batch import Batch, Outcome, Result, WriteOptions
from service.db.bulk.resolve import Creates
from service.db.dialect import is_sqlite, listed, matched
from service.errors import DatabaseUnavailable, IdTaken

RACES = 3
FOR_UPDATE: Mapping[str, Any] = {"key_share": True}  # posts may refer to the user meanwhile


class Contested(Exception):
    """Some row was not as an attempt took it to be, without having looked."""


class BulkWriter:
    """Writes the batches of one model in the session's transaction."""

    def __init__(self, session: AsyncSession, model: type[Entity]) -> None:
        self.session = session
        self.model = model
        self._way = portable if is_sqlite(session) else postgresql
        self._drawn: Sequence[int] = ()

    async def settled(self, batch: Batch, attempt: Callable[[Batch], Awaitable[Outcome]]) -> Outcome:
        """Return the outcome of an attempt, made again where another writer's commit got in its way."""
        for _ in range(1 + RACES):
            try:
                async with self.session.begin_nested():
                    return await attempt(replace(batch, failures=dict(batch.failures)))
            except (IntegrityError, Contested):
                batch.expects_conflicts = True
        raise DatabaseUnavailable("other writes keep taking the same keys; nothing was done, try again")

    async def create(
        self, batch: Batch, creates: Creates, options: WriteOptions, sort_key: str | None = None
    ) -> Outcome:
        """Write what was resolved; ids are given in file order, rows are written in the order of `sort_key`.

        Two writers with crossing keys then wait for each other instead of dying of each other.
        """
        if options.is_atomic and batch.failures:
            return Outcome.of_failed_batch(batch)
        if options.validate_only:
            return creates.outcome(batch, options, [])
        ids = await self._insert(batch, creates.columns(batch, options), len(creates.inserted), sort_key)
        await self._update(batch, creates.updated, options.update_fields)
        return creates.outcome(batch, options, ids)

    async def update(
        self, batch: Batch, updates: Mapping[int, list[int]], options: WriteOptions, moved: str | None = None
    ) -> Outcome:
        """Write updates that were resolved, in id order, each the last of its rows in the batch.

        `moved` is a unique column whose values go from one of the rows to another.
        """
        if options.is_atomic and batch.failures:
            return Outcome.of_failed_batch(batch)
        await asyncio.sleep(0)  # 5,000 rows were resolved just now
        if not options.validate_only:
            if moved:
                await self._set_aside(moved, list(updates))
            await self._update(batch, updates, options.update_fields)
        return _updated(batch)

    async def update_unseen(self, batch: Batch, options: WriteOptions) -> Outcome | None:
        """Update all good rows of a batch without a look at them first; None where their order may matter.

        Raises Contested where one of them is not there, or has another version.
        """
        rows = sorted(batch.good_rows(), key=batch.columns["id"].__getitem__)
        ids, expected = batch.take("id", rows), batch.take("version", rows)
        is_simple = len(set(ids)) == len(ids) and "email" not in options.update_fields
        if options.asks_first(batch) or not is_simple:
            return None
        columns = {field: batch.take(field, rows) for field in options.update_fields}
        columns |= {"id": ids, "times": [1] * len(ids)} | ({"expected": expected} if any(expected) else {})
        if ids and await self._way.update_rows(self.session, self.model, columns) < len(ids):
            raise Contested
        return _updated(batch)

    async def reserve(self, batch: Batch) -> None:
        """Let no other writer draw a batch's ids, from the commit on; for a short transaction of its own."""
        if largest := max((id for id in batch.take("id", batch.good_rows()) if id), default=0):
            await self._way.reserve_ids(self.session, self.model, largest)

    async def ids_by(
        self, key: InstrumentedAttribute[Any], batch: Batch, lock: Mapping[str, Any] | None = None
    ) -> dict[Any, int]:
        """Return, by the unique key, the ids of the rows that have one of the batch's values."""
        values = [value for value in batch.take(key.key, batch.good_rows()) if value is not None]
        if lock is not None:
            rows = await stored(self.session, key, values, self.model.id.label("stored_id"), lock=lock)
            return {row[0]: row.stored_id for row in rows}
        ids = await matched(self.session, key, values, _kind(values))
        return {value: id for value, id in zip(values, ids, strict=True) if id is not None}

    async def _insert(
        self, batch: Batch, columns: Mapping[str, list[Any]], size: int, sort_key: str | None
    ) -> Sequence[int]:
        if not size:
            return []
        ids = await self._ids(batch, columns.get("id"), size)
        rows = {**columns, "id": ids, **await self._times(columns)}
        await self._way.insert_rows(self.session, self.model, rows, sort_key)
        return ids

    async def _ids(self, batch: Batch, given: Sequence[int | None] | None, size: int) -> Sequence[int]:
        missing = size if given is None else given.count(None)
        if len(self._drawn) < missing:  # otherwise an attempt that failed has drawn them
            if batch.draws_after:
                await batch.draws_after.wait()
            self._drawn = await self._way.next_ids(self.session, self.model, missing)
            batch.has_drawn.set()
        rest = iter(self._drawn)
        return self._drawn[:size] if given is None else [id or next(rest) for id in given]

    async def _times(self, columns: Mapping[str, list[Any]]) -> dict[str, list[datetime]]:
        """Return the times of restored rows, with the transaction's own for those that bring none."""
        restored = {name: columns[name] for name in ("created_at", "updated_at") if name in columns}
        if not any(None in column for column in restored.values()):
            return restored
        at = (await self.session.execute(select(now()))).scalar_one()
        return {name: [moment or at for moment in column] for name, column in restored.items()}

    async def _update(self, batch: Batch, updates: Mapping[int, list[int]], fields: Sequence[str]) -> None:
        if not updates:
            return
        ids = sorted(updates)
        last = [updates[id][-1] for id in ids]
        columns = {field: batch.take(field, last) for field in fields}
        times = [len(updates[id]) for id in ids]
        await self._way.update_rows(self.session, self.model, {"id": ids, "times": times, **columns})

    async def _set_aside(self, column: str, ids: list[int]) -> None:
        """Give rows values that nobody has, until the batch's own update, which may want their old ones."""
        rows = {"id": ids, "times": [0] * len(ids), column: [f"moving {id}" for id in ids]}
        await self._way.update_rows(self.session, self.model, rows)


def _updated(batch: Batch) -> Outcome:
    results, ids = bytearray([Result.UPDATED]) * batch.size, list(batch.columns["id"])
    for row in batch.failures:
        results[row], ids[row] = Result.FAILED, 0
    return Outcome(bytes(results), ids, batch.failures)


def _kind(values: Sequence[Any]) -> TypeEngine[Any]:
    return BigInt if values and isinstance(values[0], int) else Text()


def id_taken(existing_id: int | None) -> IdTaken:
    """Return the error for an id that another row has."""
    facts = {"existing_id": existing_id} if existing_id else {}
    return IdTaken("id belongs to another row", field="id", **facts)


async def stored(
    session: AsyncSession,
    key: InstrumentedAttribute[Any],
    values: Sequence[Any],
    *columns: Any,
    lock: Mapping[str, Any] | None = None,
) -> Sequence[Row[Any]]:
    """Return the key and the columns of the rows that have one of the values.

    With `lock` the rows are locked, in id order, until the transaction ends; SQLite's writer has them all.
    """
    if not values:
        return []
    wanted = listed(session, sorted(set(values)), _kind(values))
    rows = select(key, *columns).join(wanted, wanted.c.value == key)
    if lock is not None:
        rows = rows.order_by(key.class_.id).with_for_update(of=key.class_, **lock)
    # On the connection, not the session, which would look at each row as a part of an object.
    return (await (await session.connection()).execute(rows)).all()
