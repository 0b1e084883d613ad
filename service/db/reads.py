"""Reads of one entity: batched lookups of single rows, batches, pages, and exports."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from copy import copy
from operator import itemgetter
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, bindparam, select

from roster.errors import DatabaseUnavailable, PoolExhausted, RosterError
from service.auth.caller import SYSTEM, current_share
from service.consistency import Requirement, current_requirement, latest
from service.db.base import BigInt, Column, Entity, Expression, KeyValue, ReadSession
from service.db.compiled import CompiledSelect
from service.db.dialect import is_one_of_keys
from service.db.distribution import shard_count
from service.db.engine import Database
from service.db.export import export_pages
from service.db.paging import ListQuery, Page
from service.db.replica import half_of_time
from service.db.repository import ListRequest, Repository, is_cacheable
from service.db.selection import Row, Selection, page_from_rows, readable_columns, select_page
from service.db.statements import notify_listeners
from service.db.token_keys import TokenKeys
from service.metrics import GATHERED_READS, REPLICA_FALLBACKS
from service.shares import FairQueue
from service.wire import Fields

# Rows can have contents of 1 MiB, so a statement looks up no more of them.
MAX_KEYS = 100
# A statement for two keys costs nearly as much as one for thirty. So once a statement has answered several
# lookups, the next is sent only after this many iterations of the event loop without another lookup: a busy
# loop brings other calls. With 64 calls in flight on PostgreSQL: 30 lookups a statement instead of 2, 1.8
# times the rate. A lookup that is alone does not wait.
QUIET_TURNS = 30
MAX_GATHER_SECONDS = 0.005  # for loops with long iterations

# A shared lookup on a replica counts as one with this deadline, so that the replica has half of it. A lookup
# by key that takes longer hangs.
LOOKUP_SECONDS = 2

ResultT = TypeVar("ResultT")
Rows = Mapping[KeyValue, Row]


class Waiting(NamedTuple):
    """A lookup that waits for its statement, and what it requires of a replica."""

    keys: Sequence[KeyValue]
    future: asyncio.Future[Rows]
    requirement: Requirement | None


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

    async def get_many(self, keys: Sequence[KeyValue]) -> Rows:
        """Return the rows with these keys by key, from the primary; there may be others among them.

        Raises the errors of `share`.
        """
        if self._task or self._is_single or self._has_company:
            return await self.share(keys)
        # Nobody else looks up now, nor did before. In the caller's own task this takes 50 µs less.
        self._is_single = True
        GATHERED_READS.observe(1)
        try:
            return await self.look_up(keys, share=SYSTEM)
        except (PoolExhausted, DatabaseUnavailable) as error:
            _fail(self._waiting.clear(), error)  # for the others, it would end no better
            raise
        finally:
            self._is_single = False
            if self._waiting:
                self._start()

    async def close(self) -> None:
        """Cancel the shared lookups, and wait until their statement has ended."""
        for lookup in self._waiting.clear():
            lookup.future.cancel()
        if self._task:
            self._cancel(self._task)
            await asyncio.wait([self._task])

    async def look_up(
        self, keys: Sequence[KeyValue], requirement: Requirement | None = None, share: str = ""
    ) -> Rows:
        """Return the rows with these keys, with a statement of their own.

        Its connection is from the caller's share, or from another one: if others wait for the end of the
        lookup, it must not be from the share of one caller.
        """
        found = await self._database.rows(self._query, share=share, requirement=requirement, keys=keys)
        return {self._key_of(row): row for row in found}

    async def share(self, keys: Sequence[KeyValue], requirement: Requirement | None = None) -> Rows:
        """Return the rows with these keys by key, with a statement that other lookups may share.

        It meets the requirements of all of them. Raises the errors of `Database.rows()`, an own copy in each
        caller. A caller who is cancelled does not wait for the statement.
        """
        future: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._waiting.put(current_share(), Waiting(keys, future, requirement))
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
        while known < (waiting := sum(len(lookup.keys) for lookup in self._waiting)) < MAX_KEYS:
            known = waiting
            for _ in range(QUIET_TURNS):
                await asyncio.sleep(0)
                if perf_counter() > end:
                    return

    async def _answer(self) -> None:
        lookups = [lookup for lookup in self._in_flight if not lookup.future.done()]
        keys = {key for lookup in lookups for key in lookup.keys}
        rows = await self.look_up(list(keys), _strictest(lookups), SYSTEM) if keys else {}
        for lookup in self._in_flight:
            if not lookup.future.done():
                lookup.future.set_result(rows)
        answered, self._in_flight = self._in_flight, []
        GATHERED_READS.observe(len(answered))

    def _take(self) -> None:
        """Move waiting lookups to the next statement, until it has enough keys."""
        number = 0
        while self._waiting and number < MAX_KEYS:
            lookup = self._waiting.get()
            self._in_flight.append(lookup)
            number += len(lookup.keys)
        self._has_company = len(self._in_flight) > 1

    def _cancel_if_abandoned(self) -> None:
        callers = self._in_flight or self._waiting
        task = self._task
        if task and all(lookup.future.cancelled() for lookup in callers):
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
    for lookup in lookups:
        if error and not lookup.future.done():
            lookup.future.set_exception(_copy(error))
        lookup.future.cancel()


def _is_abandoned(lookup: Waiting) -> bool:
    return lookup.future.done()


def _strictest(lookups: Sequence[Waiting]) -> Requirement | None:
    """Return a requirement that meets those of all lookups, None for the primary."""
    required = [lookup.requirement for lookup in lookups if lookup.requirement]
    position = latest([requirement.position for requirement in required])
    if position is None or len(required) < len(lookups):
        return None
    return Requirement(position, asyncio.get_running_loop().time() + LOOKUP_SECONDS)


def _copy(error: BaseException) -> Exception:
    """Return a copy of an error for one caller: an error raised by many would collect their tracebacks."""
    own = copy(error) if isinstance(error, RosterError) else RuntimeError("a lookup failed")
    own.__cause__ = error
    return own


class Lookups:
    """Looks up rows by a unique column: on the primary, or on a replica if the current call admits one.

    Lookups for the primary and for replicas share no statements: otherwise one of the former would move all
    of the latter to the primary.
    """

    def __init__(self, database: Database, key: Column, columns: Sequence[Expression]) -> None:
        self._replica = database.replica
        self._on_primary = LookupBatcher(database, key, columns)
        self._on_replica = LookupBatcher(database, key, columns)  # unused without replicas

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

        Raises the errors of `LookupBatcher.get_many`.
        """
        if self._replica is None or (requirement := current_requirement()) is None:
            return await self._on_primary.get_many(keys)
        if not self._replica.has_replayed(requirement.position):
            # It may have to wait, and others must not wait with it: the position may not even exist.
            return await self._on_replica.look_up(keys, requirement)
        try:
            async with half_of_time(requirement):
                return await self._on_replica.share(keys, requirement)
        except TimeoutError:  # of this caller; the others may have more time for the statement
            REPLICA_FALLBACKS.labels("slow").inc()
            return await self._on_primary.get_many(keys)

    async def close(self) -> None:
        """Cancel the shared lookups."""
        await self._on_primary.close()
        await self._on_replica.close()


class Reader:
    """Reads rows of one entity, on a replica if the current call admits one.

    Concurrent reads of single rows, by a unique column, share statements.
    """

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
        self._rows = {kind: Lookups(database, key, columns) for kind, key in self._keys.items()}
        # Batches have statements of their own, so that a single read does not wait for a thousand rows.
        self._batches = Lookups(database, model.id, columns)
        self._others: dict[tuple[type, Sequence[Column]], Lookups] = {}
        self._pages: dict[tuple[Any, ...], CompiledSelect] = {}
        self._token_keys = TokenKeys(database)

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
            return await self.read(lambda session: self._repository(session).get_many(ids, selection))
        found = await self._batches.get_many(ids)
        await self._database.loop_turns.next(len(ids))
        return [found.get(id) for id in ids]

    async def list_query(
        self, request: ListRequest, *scope: ColumnElement[bool], scope_key: int = 0
    ) -> ListQuery:
        """Return the query of a List request; see `Repository.list_query`."""
        return await self._repository.list_query(request, self._token_keys, *scope, scope_key=scope_key)

    async def page(self, query: ListQuery, selection: Selection | None = None) -> Page[Row]:
        """Return a page of rows, which is shorter than its limit if the answer would be too large."""
        basic = self._repository.basic()
        is_special = query.conditions or selection not in (None, basic)
        if is_special or shard_count(self._database.engine.dialect, self._repository.model):
            return await self.read(lambda session: self._repository(session).page(query, selection))
        values = {f"after{number}": value for number, value in enumerate(query.after or ())}
        statement, requirement = self._all_rows(query), current_requirement()
        found = await self._database.rows(statement, requirement=requirement, **values, limit=query.limit)
        await self._database.loop_turns.next(len(found))
        return page_from_rows(basic, found, query.keyset, query.limit)

    async def count(self, filter_text: str, *scope: ColumnElement[bool], at_most: int) -> Fields:
        """Return how many rows within a scope match a filter, as the fields of an answer: at most `at_most`.

        Raises InvalidFilter.
        """
        conditions = [*scope, *await self._repository.conditions(filter_text)]
        limit = at_most + 1  # one more shows whether there are others

        async def count(session: ReadSession) -> int:
            rows = self._repository(session)
            return await rows.count(conditions, limit, is_cacheable=is_cacheable(filter_text))

        found = await self.read(count)
        return {"count": min(found, at_most), "is_exact": found <= at_most}

    async def read(self, read: Callable[[ReadSession], Awaitable[ResultT]]) -> ResultT:
        """Return the result of `read` with a read session; if a replica fails, it is called again."""
        return await self._database.run(read, current_requirement())

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
            self._others[kind, columns] = Lookups(self._database, self._keys[kind], columns)
        return await self._others[kind, columns].get(key, others)

    async def export(
        self, filter_text: str, after_id: int, limit: int, requirement: Requirement | None
    ) -> AsyncGenerator[Sequence[Row]]:
        """Yield all rows that match a filter, in id order, at most `limit` at a time; raises InvalidFilter.

        Each batch is read with a connection of its own, so that a slow client holds none. The next batch is
        read while the client receives the last one.
        """
        conditions = await self._repository.conditions(filter_text)
        pages = export_pages(self._database, self._repository, conditions, limit, requirement)
        reading = asyncio.create_task(pages.read(after_id))
        try:
            while (found := await reading).rows:
                if found.next_key:
                    reading = asyncio.create_task(pages.read(*found.next_key))
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
