"""LoadRepository: all SQL about bulk loads that have a name.

A load has a watermark, and the outcome of every row below it until the load expires. Its key is the caller
who began it, and the name that this caller gave it.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import accumulate
from operator import sub
from typing import Any, NamedTuple

import orjson
from sqlalchemy import ColumnElement, Update, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from roster.errors import InvalidField, LoadExpired, LoadFenced, LoadNotFound, RosterError, error_of
from service.db.base import Column, now
from service.db.bulk.batch import Outcome
from service.db.dialect import insert
from service.db.paging import Keyset, Page
from service.loads.model import COUNTED, Load, LoadBatch, LoadState
from service.timeslice import TimeSlice, map_in_slices

FAILED_BATCHES_AT_ONCE = 10
BATCHES_AT_ONCE = 100
# An error names the callers who have a load. A status has room for 1,500 bytes of any characters, twice.
MAX_CALLERS_NAMED = 10
MAX_CALLERS_BYTES = 1500
BATCH_COLUMNS = (
    LoadBatch.first_offset,
    LoadBatch.next_offset,
    LoadBatch.results,
    LoadBatch.ids,
    LoadBatch.failures,
    LoadBatch.deleted_posts,
)
RESULT_COLUMNS = (LoadBatch.first_offset, LoadBatch.results, LoadBatch.ids)


class LoadRow(NamedTuple):
    """A settled row of a load. An id of 0 means none."""

    offset: int
    result: int
    id: int


class LoadRepository:
    """The loads of one caller, or of all callers if `caller` is None."""

    def __init__(self, session: AsyncSession, caller: str | None) -> None:
        self.session = session
        self.caller = caller

    async def open(self, load_id: str, method: str, options: bytes) -> Load:
        """Begin or continue a load, and fence off its older streams.

        A load keeps the method and the options it began with. Until the contracting migration has run, a name
        has one load: raises LoadNotFound if it is another caller's.
        """
        # Without a target, ON CONFLICT covers the key that the table has: before the contracting migration
        # the name alone, after it the name and the caller.
        begun = (
            insert(self.session, Load)
            .values(load_id=load_id, caller=self.caller, method=method, stored_options=options)
            .on_conflict_do_nothing()
            .returning(Load.id)
        )
        # The INSERT waits for a concurrent transaction with the same key. If that one commits, its row is
        # visible to the UPDATE, which has a later snapshot. Loads are never deleted.
        id = await self.session.scalar(begun) or await self._continue(load_id)
        if id is None:
            raise _name_taken()
        return await self._read(id)

    async def resume(self, load_id: str) -> Load:
        """Continue a load and fence off its older streams; raises LoadNotFound."""
        id = await self._continue(load_id)
        if id is None:
            raise _missing()
        return await self._read(id)

    async def find(self, load_id: str) -> Load | None:
        """Return the load of this name, None if there is none.

        Raises InvalidField on `caller` if this is about all callers, and several of them have one.
        """
        loads = select(Load).where(Load.load_id == load_id, *self._of_caller()).order_by(Load.caller)
        found = (await self.session.scalars(loads.limit(MAX_CALLERS_NAMED + 1))).all()
        if len(found) > 1:
            raise _ambiguous([load.caller for load in found])
        return found[0] if found else None

    async def get(self, load_id: str) -> Load:
        """Return a load, as `find` does; raises LoadNotFound, InvalidField."""
        load = await self.find(load_id)
        if load is None:
            raise _missing()
        return load

    async def page(self, after: Sequence[int] | None, limit: int) -> Page[Load]:
        """Return a page of loads, the newest first."""
        keyset = Keyset([Load.__table__.c.id], descending=True)
        conditions = [*self._of_caller(), *([keyset.after(after)] if after else [])]
        loads = select(Load).where(*conditions).order_by(*keyset.order()).limit(limit + 1)
        found = (await self.session.scalars(loads)).all()
        return Page(found[:limit], [found[limit - 1].id] if len(found) > limit else None)

    async def record(self, load: Load, offset: int, outcome: Outcome) -> None:
        """Record the outcome of a batch and move the watermark past it, just before the commit.

        Raises LoadFenced if a newer stream has the load, or if it is no longer open.
        """
        end = offset + len(outcome.ids)
        failures = await _packed_failures(outcome)
        # If the newer stream has recorded this offset, nothing is inserted. Then the watermark has moved
        # too, and the update below finds no row.
        await self.session.execute(
            insert(self.session, LoadBatch)
            .values(
                load=load.id,
                first_offset=offset,
                next_offset=end,
                results=zlib.compress(outcome.results, 1),
                ids=_pack(outcome.ids),
                failures=failures,
                deleted_posts=_pack(outcome.dependents) if outcome.dependents else None,
            )
            .on_conflict_do_nothing()
        )
        counted = {name: getattr(Load, name) + getattr(outcome, name) for name in COUNTED}
        updated = await self.session.scalar(
            self._fenced(load)
            .where(Load.next_offset == offset)
            .values(next_offset=end, **counted, updated_at=now())
            .returning(Load.id)
        )
        if updated is None:
            raise _fenced()

    async def watermark(self, load: Load) -> int:
        """Return the watermark, after waiting for a commit that may be in progress; raises LoadFenced."""
        found = select(Load.next_offset).where(*self._if_current(load)).with_for_update()
        offset = await self.session.scalar(found)
        if offset is None:
            raise _fenced()
        return offset

    async def finish(self, load: Load) -> None:
        """Complete a load; raises LoadFenced."""
        finished = self._fenced(load).values(state=LoadState.FINISHED, updated_at=now()).returning(Load.id)
        if await self.session.scalar(finished) is None:
            raise _fenced()

    async def abort(self, load: Load) -> Load:
        """Abort a load if it is open, and fence off its stream; return the load as it is then."""
        await self.session.execute(
            update(Load)
            .where(Load.id == load.id, Load.state == LoadState.OPEN)
            .values(state=LoadState.ABORTED, epoch=Load.epoch + 1, updated_at=now())
            .execution_options(synchronize_session=False)
        )
        return await self._read(load.id)

    async def outcome(self, load: Load, start: int, end: int) -> Outcome:
        """Return the first outcome of committed rows, which may be in any number of batches."""
        whole, time_slice = Outcome(), TimeSlice()
        for some in await self._batches(load, start, end, BATCH_COLUMNS):
            for batch in some:
                whole.extend(await _outcome(batch, start, end))
                await time_slice.pause()
        return whole

    async def rows(self, load: Load, start: int, limit: int) -> list[LoadRow]:
        """Return the settled rows from an offset on, at most `limit` of them; raises LoadExpired."""
        found: list[LoadRow] = []
        end, time_slice = min(start + limit, load.next_offset), TimeSlice()
        for some in await self._batches(load, start, end, RESULT_COLUMNS):
            for batch in some:
                found += _rows(batch, start, end)
                await time_slice.pause()
        # The load may have expired since it was read, with a part of its batches deleted or all of them.
        if load.state == LoadState.EXPIRED or len(found) < end - start:
            raise LoadExpired("the load has expired and the outcomes of its rows are deleted")
        return found

    async def _batches(
        self, load: Load, start: int, end: int, columns: Sequence[Column]
    ) -> Iterator[Sequence[Any]]:
        """Return the batches that have rows between two offsets, some at a time."""
        # The last batch that begins at `start` or before; the index finds it in one step at any depth.
        first = select(func.max(LoadBatch.first_offset)).where(
            LoadBatch.load == load.id, LoadBatch.first_offset <= start
        )
        batches = (
            select(*columns)
            .where(
                LoadBatch.load == load.id,
                LoadBatch.first_offset >= first.scalar_subquery(),
                LoadBatch.first_offset < end,
            )
            .order_by(LoadBatch.first_offset)
        )
        connection = await self.session.connection()
        return (await connection.execute(batches)).partitions(BATCHES_AT_ONCE)

    async def failures(self, load: Load, after: int, limit: int) -> list[tuple[int, RosterError]]:
        """Return the failed rows with offsets after `after`, at most `limit` of them."""
        found: list[tuple[int, RosterError]] = []
        end, time_slice = after + 1, TimeSlice()
        # Each batch has at least one failed row, but that of the first batch may come before `start`.
        while batches := await self._failed_batches(load, end, min(limit, FAILED_BATCHES_AT_ONCE)):
            for batch in batches:
                start = max(after + 1 - batch.first_offset, 0)
                rows = [row for row in _unpack_failures(batch.failures) if row[0] >= start]
                errors = await map_in_slices(_error, rows[: limit - len(found)])
                found += [(batch.first_offset + row, error) for row, error in errors]
                if len(found) == limit:
                    return found
                await time_slice.pause()
            end = batches[-1].next_offset
        return found

    async def _failed_batches(self, load: Load, end: int, limit: int) -> Sequence[Any]:
        """Return the first batches with failures that end after `end`."""
        batches = (
            select(LoadBatch.first_offset, LoadBatch.next_offset, LoadBatch.failures)
            .where(LoadBatch.load == load.id, LoadBatch.failures.is_not(None), LoadBatch.next_offset > end)
            .order_by(LoadBatch.first_offset)
            .limit(limit)
        )
        return (await self.session.execute(batches)).all()

    async def _continue(self, load_id: str) -> int | None:
        """Count one more stream of a load, and return its id; None if the caller has no such load."""
        continued = (
            update(Load)
            .where(Load.load_id == load_id, Load.caller == self.caller)
            .values(epoch=Load.epoch + 1)
            .returning(Load.id)
            .execution_options(synchronize_session=False)
        )
        return await self.session.scalar(continued)

    async def _read(self, id: int) -> Load:
        """Return the load with an id, as this transaction has left it."""
        load = select(Load).where(Load.id == id).execution_options(populate_existing=True)
        return (await self.session.scalars(load)).one()

    def _of_caller(self) -> list[ColumnElement[bool]]:
        return [] if self.caller is None else [Load.caller == self.caller]

    @staticmethod
    def _if_current(load: Load) -> list[ColumnElement[bool]]:
        return [Load.id == load.id, Load.epoch == load.epoch, Load.state == LoadState.OPEN]

    def _fenced(self, load: Load) -> Update:
        return update(Load).where(*self._if_current(load)).execution_options(synchronize_session=False)


async def expire_loads(session: AsyncSession, before: datetime) -> None:
    """Delete the outcomes and options of loads that were last updated before a time.

    The loads themselves stay, so that none can begin a second time.
    """
    # Update the loads first: a batch that is written meanwhile waits for this transaction and finds its load
    # expired. Or this transaction waits for the batch, and then the load is no longer old.
    is_late = (Load.updated_at < before) & (Load.state != LoadState.EXPIRED)
    # Earlier releases did not delete the options.
    has_options = (Load.state == LoadState.EXPIRED) & (func.length(Load.stored_options) > 0)
    expired = (
        update(Load)
        .where(or_(is_late, has_options))
        .values(state=LoadState.EXPIRED, stored_options=b"")
        .returning(Load.id)
        .execution_options(synchronize_session=False)
    )
    ids = (await session.scalars(expired)).all()
    await session.execute(delete(LoadBatch).where(LoadBatch.load.in_(ids)))


def _pack(ids: list[int]) -> bytes:
    # Ids drawn together differ by one, so their differences compress to a few bytes.
    return zlib.compress(array("q", map(sub, ids, [0, *ids[:-1]])).tobytes(), 1)


def _unpack(packed: bytes) -> list[int]:
    return list(accumulate(array("q", zlib.decompress(packed))))


async def _packed_failures(outcome: Outcome) -> bytes | None:
    if not outcome.failures:
        return None
    rows = await map_in_slices(_parts, sorted(outcome.failures.items()))
    return zlib.compress(orjson.dumps(rows), 1)


def _parts(failure: tuple[int, RosterError]) -> tuple[Any, ...]:
    row, error = failure
    return row, error.reason, error.message, error.field, error.facts


def _unpack_failures(packed: bytes | None) -> list[list[Any]]:
    """Return the parts of failed rows. 5,000, the most that a batch can have, take 2 ms."""
    rows: list[list[Any]] = orjson.loads(zlib.decompress(packed)) if packed else []
    return rows


def _error(parts: Sequence[Any]) -> tuple[int, RosterError]:
    row, *rest = parts
    return row, error_of(*rest)


async def _outcome(batch: Any, start: int, end: int) -> Outcome:
    """Return the outcome of the rows of a batch that are between `start` and `end`."""
    first = batch.first_offset
    start, end = max(start - first, 0), min(end, batch.next_offset) - first
    rows = [row for row in _unpack_failures(batch.failures) if start <= row[0] < end]
    failures = dict(await map_in_slices(_error, rows))
    dependents = _unpack(batch.deleted_posts) if batch.deleted_posts else []
    whole = Outcome(zlib.decompress(batch.results), _unpack(batch.ids), failures, dependents)
    return whole.part(start, end)


def _rows(batch: Any, start: int, end: int) -> list[LoadRow]:
    """Return the rows of a batch that are between `start` and `end`. 5,000 take 2 ms."""
    first = batch.first_offset
    part = slice(max(start - first, 0), end - first)
    results, ids = zlib.decompress(batch.results)[part], _unpack(batch.ids)[part]
    return list(map(LoadRow, range(first + part.start, end), results, ids))


def _missing() -> LoadNotFound:
    return LoadNotFound("there is no such load", field="load_id")


def _name_taken() -> LoadNotFound:
    # The reason is that of earlier releases, which may still run on the same database.
    return LoadNotFound(
        "another caller has a load of this name; use another load_id, or ask the operator to run "
        "`roster migrate --contract`, after which each caller has names of its own",
        field="load_id",
    )


def _ambiguous(callers: Sequence[str]) -> InvalidField:
    names = ", ".join(callers[:MAX_CALLERS_NAMED]).encode()[:MAX_CALLERS_BYTES].decode(errors="ignore")
    others = " and others" if len(callers) > MAX_CALLERS_NAMED else ""
    return InvalidField(
        f"caller is required, because several callers have a load of this name: {names}{others}",
        field="caller",
    )


def _fenced() -> LoadFenced:
    return LoadFenced("a newer stream has opened this load, or it was aborted; this stream can't continue")
