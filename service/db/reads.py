"""Reads of one entity: batched lookups of single rows, batches, pages, and exports."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import Context
from copy import copy
from operator import itemgetter
from time import perf_counter
from typing import Any

from sqlalchemy import bindparam, select

from service.auth.caller import SYSTEM, current_share
from service.db.base import BigInt, Column, Entity, Expression, KeyValue
from service.db.compiled import CompiledSelect
from service.db.dialect import is_one_of_keys
from service.db.engine import Database
from service.db.paging import ListQuery, Page
from service.db.repository import Repository
from service.db.selection import Row, Selection, page_from_rows, readable_columns, select_page
from service.db.statements import notify_listeners
from service.errors import DatabaseUnavailable, PoolExhausted, RosterError
from service.metrics import GATHERED_READS
from service.shares import FairQueue

# Rows can have contents of 1 MiB, so a statement looks up no more of them.
MAX_KEYS = 100
# A statement for two keys costs nearly as much as one for thirty. So once a statement has answered several
# lookups, the next is sent only after this many iterations of the event loop without another lookup: a busy
# loop brings other calls. With 64 calls in flight on PostgreSQL: 30 lookups a statement instead of 2, 1.8
# times the rate. A lookup that is alone does not wait.
QUIET_TURNS = 30
MAX_GATHER_SECONDS = 0.005  # for loops with long iterations

Rows = Mapping[KeyValue, Row]
Waiting = tuple[Sequence[KeyValue], asyncio.Future[Rows]]


class LookupBatcher:
    """Looks up rows by a unique column; lookups that come in during a statement share the next one.

    Every lookup therefore sees what was committed before it. A cancelled lookup does not affect the others; a
    statement is cancelled once all of its lookups are. Waiting callers take turns, so that a caller with many
    lookups does not delay the others.
    """

    def __init__(self, database: Database, key: Column, columns: Sequence[Expression]) -> None:
        dialect = database.engine.dialect
        self._database = database
        self._query = CompiledSelect(select(*columns).where(is_one_of_keys(key, dialect)), dialect)
        self._key_of = itemgetter([column.key for column in columns].index(key.key))
        self._waiting: FairQueue[Waiting] = FairQueue()
        self._in_flight: list[Waiting] = []
        self._has_company = False  # whether the last statement answered several lookups
        self._is_single = False  # whether the statement of a single lookup is in flight
        self._task: asyncio.Task[None] | None = None  # sends the statements of shared lookups

    async def get(self, key: KeyValue, others: Sequence[KeyValue] = ()) -> Row | None:
        """Return the row with this key, otherwise with the first of the others that a row has, or None.

        Raises the same errors as `get_many`.
        """
        keys = [key, *others]
        rows = await self.get_many(keys)
        for each in keys:
            if each in rows:
                return rows[each]
        return None

    async def get_many(self, keys: Sequence[KeyValue]) -> Rows:
        """Return the rows with these keys by key; there may be others among them.

        Raises the errors of `Database.rows()`, an own copy in each caller.
        """
        if self._task or self._is_single or self._has_company:
            return await self._share(keys)
        # Nobody else looks up now, nor did before. In the caller's own task this takes 50 µs less.
        self._is_single = True
        GATHERED_READS.observe(1)
        try:
            return await self._look_up(keys)
        except (PoolExhausted, DatabaseUnavailable) as error:
            _fail(self._waiting.clear(), error)  # for the others, it would end no better
            raise
        finally:
            self._is_single = False
            if self._waiting:
                self._start()

    async def close(self) -> None:
        """Cancel the shared lookups, and wait until their statement has ended."""
        for _, future in self._waiting.clear():
            future.cancel()
        if self._task:
            self._cancel(self._task)
            await asyncio.wait([self._task])

    async def _look_up(self, keys: Sequence[KeyValue]) -> Rows:
        # Not from the share of one caller: others may wait for the end of its lookup.
        found = await self._database.rows(self._query, share=SYSTEM, keys=keys)
        return {self._key_of(row): row for row in found}

    async def _share(self, keys: Sequence[KeyValue]) -> Rows:
        future: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._waiting.put(current_share(), (keys, future))
        if not (self._task or self._is_single):
            self._start()
        began = perf_counter()
        try:
            return await future
        except asyncio.CancelledError:
            self._cancel_if_abandoned()
            raise
        finally:
            notify_listeners(self._query.sql, perf_counter() - began)

    def _start(self) -> None:
        # In an empty context: the task does not belong to one call.
        self._task = asyncio.create_task(self._run(), context=Context())
        self._task.add_done_callback(self._ended)

    async def _run(self) -> None:
        while self._waiting:
            if self._has_company or len(self._waiting) > 1:
                await self._gather()
            self._take()
            await self._answer()

    async def _gather(self) -> None:
        """Wait until the event loop brings no more lookups, or there are enough of them, at most 5 ms."""
        end, known = perf_counter() + MAX_GATHER_SECONDS, 0
        while known < (waiting := sum(len(keys) for keys, _ in self._waiting)) < MAX_KEYS:
            known = waiting
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
                if perf_counter() > end:
                    return

    async def _answer(self) -> None:
        keys = {key for asked, future in self._in_flight if not future.done() for key in asked}
        rows = await self._look_up(list(keys)) if keys else {}
        for _, future in self._in_flight:
            if not future.done():
                future.set_result(rows)
        answered, self._in_flight = self._in_flight, []
        GATHERED_READS.observe(len(answered))

    def _take(self) -> None:
        """Move waiting lookups to the next statement, until it has enough keys."""
        number = 0
        while self._waiting and number < MAX_KEYS:
            lookup = self._waiting.get()
            self._in_flight.append(lookup)
            number += len(lookup[0])
        self._has_company = len(self._in_flight) > 1

    def _cancel_if_abandoned(self) -> None:
        callers = self._in_flight or self._waiting
        task = self._task
        if task and all(future.cancelled() for _, future in callers):
            self._cancel(task)

    @staticmethod
    def _cancel(task: "asyncio.Task[None]") -> None:
        if not task.cancelling():  # a second cancellation would interrupt the cleanup of the first
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        unanswered, self._in_flight = self._in_flight, []
        self._waiting.discard(_is_abandoned)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, PoolExhausted | DatabaseUnavailable):
            unanswered += self._waiting.clear()
        _fail(unanswered, error)
        self._task = None
        if self._waiting:
            self._start()


def _fail(lookups: Sequence[Waiting], error: BaseException | None) -> None:
    """Give each lookup the error, or cancel it if there is none."""
    for _, future in lookups:
        if error and not future.done():
            future.set_exception(_copy(error))
        future.cancel()


def _is_abandoned(lookup: Waiting) -> bool:
    return lookup[1].done()


def _copy(error: BaseException) -> Exception:
    """Return a copy of an error for one caller: an error raised by many would collect their tracebacks."""
    own = copy(error) if isinstance(error, RosterError) else RuntimeError("a lookup failed")
    own.__cause__ = error
    return own


class Reader:
    """Reads rows of one entity. Concurrent reads of single rows, by a unique column, share statements."""

    def __init__(
        self, database: Database, repository: type[Repository[Any, Any]], by: Sequence[Column] = ()
    ) -> None:
        self._database = database
        self._repository = repository
        model: type[Entity] = repository.model
        columns = readable_columns(model)
        keys: Sequence[Column] = by or [model.id]
        # The type of a key says which column it belongs to.
        self._keys = {key.type.python_type: key for key in keys}
        self._rows = {kind: LookupBatcher(database, key, columns) for kind, key in self._keys.items()}
        # Batches have statements of their own, so that a single read does not wait for a thousand rows.
        self._batches = LookupBatcher(database, model.id, columns)
        self._others: dict[tuple[type, Sequence[Column]], LookupBatcher] = {}
        self._pages: dict[tuple[Any, ...], CompiledSelect] = {}

    async def get(self, key: KeyValue, others: Sequence[KeyValue] = ()) -> Row:
        """Return the row with this key, otherwise with the first of the others that a row has.

        Raises the entity's NotFound.
        """
        row = await self._rows[type(key)].get(key, others)
        if row is None:
            raise self._repository.missing()
        return row

    async def get_many(self, ids: Sequence[int], selection: Selection | None = None) -> list[Row | None]:
        """Return the rows with these ids in their order, None for each that is missing.

        If the answer would be too large, the list is shorter than `ids`.
        """
        basic = self._repository.basic()
        if selection not in (None, basic) or basic.size is not None:
            async with self._database.read() as session:
                return await self._repository(session).get_many(ids, selection)
        found = await self._batches.get_many(ids)
        await self._database.loop_turns.next(len(ids))
        return [found.get(id) for id in ids]

    async def page(self, query: ListQuery, selection: Selection | None = None) -> Page[Row]:
        """Return a page of rows, which is shorter than its limit if the answer would be too large."""
        basic = self._repository.basic()
        if query.conditions or selection not in (None, basic):
            async with self._database.read() as session:
                return await self._repository(session).page(query, selection)
        values = {f"after{number}": value for number, value in enumerate(query.after or ())}
        found = await self._database.rows(self._all_rows(query), **values, limit=query.limit)
        await self._database.loop_turns.next(len(found))
        return page_from_rows(basic, found, query.keyset, query.limit)

    def _all_rows(self, query: ListQuery) -> CompiledSelect:
        """Return the statement of a page of all rows: one for each order, with and without a key."""
        columns = query.keyset.columns
        key = (*(column.key for column in columns), query.keyset.descending, query.after is None)
        if key not in self._pages:
            after = [bindparam(f"after{number}", type_=column.type) for number, column in enumerate(columns)]
            page = select_page(
                self._repository.basic(),
                keyset=query.keyset,
                after=after if query.after else None,
                limit=bindparam("limit", type_=BigInt),
            )
            self._pages[key] = CompiledSelect(page, self._database.engine.dialect)
        return self._pages[key]

    async def find_columns(
        self, key: KeyValue, columns: tuple[Column, ...], others: Sequence[KeyValue] = ()
    ) -> Row | None:
        """Return columns that other reads do not select, of the row that `get` returns, or None."""
        kind = type(key)
        if (kind, columns) not in self._others:
            self._others[kind, columns] = LookupBatcher(self._database, self._keys[kind], columns)
        return await self._others[kind, columns].get(key, others)

    async def export(self, filter_text: str, after_id: int, limit: int) -> AsyncGenerator[Sequence[Row]]:
        """Yield all rows that match a filter, in id order, at most `limit` at a time; raises InvalidFilter.

        Each batch is read with a connection of its own, so that a slow client holds none. The next batch is
        read while the client receives the last one.
        """
        conditions = await self._repository.conditions(filter_text)
        selection, keyset = self._repository.basic(), self._repository.by_id()
        after = bindparam("after", type_=BigInt)
        page = select_page(selection, *conditions, keyset=keyset, after=[after], limit=limit)
        query = CompiledSelect(page, self._database.engine.dialect)

        async def read(after: int) -> Page[Row]:
            found = await self._database.rows(query, after=after)
            return page_from_rows(selection, found, keyset, limit)

        reading = asyncio.create_task(read(after_id))
        try:
            while (found := await reading).rows:
                if found.next_key:
                    reading = asyncio.create_task(read(*found.next_key))
                    await asyncio.sleep(0)  # send its statement before these rows are encoded
                await self._database.loop_turns.next(len(found.rows))
                yield found.rows
                if not found.next_key:
                    return
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def close(self) -> None:
        """Cancel the lookups that share statements; one that is alone belongs to its caller's task."""
        for batcher in (*self._rows.values(), self._batches, *self._others.values()):
            await batcher.close()
