"""How many rows are written at once: each database in its own way, behind one class."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, Text, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from service.db.base import BigInt, Entity
from service.db.bulk import portable, postgresql
from service.db.bulk.batch import Batch, Outcome, WriteOptions
from service.db.bulk.resolve import Creates
from service.db.dialect import is_sqlite, listed
from service.errors import DatabaseUnavailable

RACES = 3
FOR_UPDATE: Mapping[str, Any] = {}
FOR_REFERENCE: Mapping[str, Any] = {"read": True, "key_share": True}


class BulkWriter:
    """Writes the batches of one model in the session's transaction."""

    def __init__(self, session: AsyncSession, model: type[Entity]) -> None:
        self.session = session
        self.model = model
        self._way = portable if is_sqlite(session) else postgresql

    async def settled(self, batch: Batch, attempt: Callable[[Batch], Awaitable[Outcome]]) -> Outcome:
        """Return the outcome of an attempt, made again where another writer's commit got in its way."""
        for _ in range(RACES):
            try:
                async with self.session.begin_nested():
                    return await attempt(replace(batch, failures=dict(batch.failures)))
            except IntegrityError:
                continue
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
        ids = await self._insert(creates.columns(batch, options), len(creates.inserted), sort_key)
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
        if not options.validate_only:
            if moved:
                await self._set_aside(moved, list(updates))
            await self._update(batch, updates, options.update_fields)
        ids = [0 if row in batch.failures else id for row, id in enumerate(batch.columns["id"])]
        failed = len(batch.failures)
        return Outcome(ids=ids, failures=batch.failures, updated=batch.size - failed, failed=failed)

    async def _insert(self, columns: Mapping[str, list[Any]], size: int, sort_key: str | None) -> list[int]:
        if not size:
            return []
        ids: list[int] = await self._way.next_ids(self.session, self.model, size)
        rows = {"id": ids, **columns}
        if sort_key:
            order = sorted(range(size), key=columns[sort_key].__getitem__)
            rows = {name: [column[row] for row in order] for name, column in rows.items()}
        await self._way.insert_rows(self.session, self.model, rows)
        return ids

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


async def stored(
    session: AsyncSession,
    key: InstrumentedAttribute[Any],
    values: Sequence[Any],
    *columns: InstrumentedAttribute[Any],
    lock: Mapping[str, Any] | None = None,
) -> Sequence[Row[Any]]:
    """Return the key and the columns of the rows that have one of the values.

    With `lock` the rows are locked, in id order, until the transaction ends; SQLite's writer has them all.
    """
    if not values:
        return []
    wanted = listed(session, sorted(set(values)), BigInt if isinstance(values[0], int) else Text())
    rows = select(key, *columns).join(wanted, wanted.c.value == key)
    if lock is not None:
        rows = rows.order_by(key.class_.id).with_for_update(of=key.class_, **lock)
    return (await session.execute(rows)).all()
