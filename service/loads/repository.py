"""LoadRepository: all SQL about bulk loads that have a name.

A load has a watermark, and the outcome of every row below it until the load expires.
"""

import zlib
from array import array
from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from operator import sub
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Update, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.base import now
from service.db.bulk.batch import Outcome
from service.db.dialect import insert
from service.db.paging import Keyset, Page
from service.errors import LoadFenced, LoadNotFound, RosterError, error_of
from service.loads.model import COUNTED, Load, LoadBatch, LoadState
from service.timeslice import TimeSlice, map_in_slices

FAILED_BATCHES_AT_ONCE = 10
BATCHES_AT_ONCE = 100
BATCH_COLUMNS = (
    LoadBatch.first_offset,
    LoadBatch.next_offset,
    LoadBatch.results,
    LoadBatch.ids,
    LoadBatch.failures,
)


class LoadRepository:
    """The loads of one caller, or of all callers if `caller` is None."""

    def __init__(self, session: AsyncSession, caller: str | None) -> None:
        self.session = session
        self.caller = caller

    async def open(self, load_id: str, method: str, options: bytes) -> Load:
        """Begin or continue a load, and fence off its older streams.

        A load keeps the method and the options it began with. Raises LoadNotFound for another caller's load.
        """
        begun = insert(self.session, Load).values(
            load_id=load_id, caller=self.caller, method=method, stored_options=options
        )
        await self.session.execute(
            begun.on_conflict_do_update(index_elements=[Load.load_id], set_={"epoch": Load.epoch + 1})
        )
        load = (await self.session.scalars(select(Load).where(Load.load_id == load_id))).one()
        if load.caller != self.caller:
            raise _missing()
        return load

    async def get(self, load_id: str) -> Load:
        """Return a load; raises LoadNotFound."""
        load = await self.session.scalar(select(Load).where(Load.load_id == load_id, *self._of_caller()))
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

    async def abort(self, load_id: str) -> Load:
        """Abort a load if it is open, and fence off its stream; raises LoadNotFound."""
        await self.session.execute(
            update(Load)
            .where(Load.load_id == load_id, Load.state == LoadState.OPEN, *self._of_caller())
            .values(state=LoadState.ABORTED, epoch=Load.epoch + 1, updated_at=now())
        )
        return await self.get(load_id)

    async def outcome(self, load: Load, start: int, end: int) -> Outcome:
        """Return the first outcome of committed rows, which may be in any number of batches."""
        whole, time_slice = Outcome(), TimeSlice()
        connection = await self.session.connection()
        batches = await connection.execute(
            select(*BATCH_COLUMNS)
            .where(LoadBatch.load == load.id, LoadBatch.next_offset > start, LoadBatch.first_offset < end)
            .order_by(LoadBatch.first_offset)
        )
        for some in batches.partitions(BATCHES_AT_ONCE):
            for batch in some:
                whole.extend(await _outcome(batch, start, end))
                await time_slice.pause()
        return whole

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
    return Outcome(zlib.decompress(batch.results), _unpack(batch.ids), failures).part(start, end)


def _missing() -> LoadNotFound:
    return LoadNotFound("there is no such load", field="load_id")


def _fenced() -> LoadFenced:
    return LoadFenced("a newer stream has opened this load, or it was aborted; this stream can't continue")
