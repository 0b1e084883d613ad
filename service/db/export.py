"""The pages of an export: all rows that match a filter, in id order."""

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import ColumnElement, bindparam, func, select

from service.consistency import Requirement
from service.db.base import BigInt
from service.db.compiled import CompiledSelect
from service.db.dialect import is_one_of_keys
from service.db.distribution import shard_count
from service.db.engine import Database
from service.db.paging import Page
from service.db.repository import Repository
from service.db.selection import (
    Row,
    count_fitting,
    page_from_rows,
    select_page,
    select_rows,
    select_sizes,
)

MAX_ID = (1 << 63) - 1
AnyRepository = type[Repository[Any, Any]]
Conditions = Sequence[ColumnElement[bool]]


class ExportPages(Protocol):
    """Reads the pages of an export, each of at most `limit` rows, as the `requirement` says."""

    async def read(self, after: int) -> Page[Row]:
        """Return the first rows after an id; an empty page is the last one."""


def export_pages(
    database: Database,
    repository: AnyRepository,
    conditions: Conditions,
    limit: int,
    requirement: Requirement | None,
) -> ExportPages:
    """Return what reads the pages of an export."""
    is_distributed = shard_count(database.engine.dialect, repository.model) > 0
    kind = DistributedPages if is_distributed else PlainPages
    return kind(database, repository, conditions, limit, requirement)


class PlainPages:
    """Reads each page with one statement."""

    def __init__(
        self,
        database: Database,
        repository: AnyRepository,
        conditions: Conditions,
        limit: int,
        requirement: Requirement | None,
    ) -> None:
        self._database, self._requirement = database, requirement
        self._selection, self._keyset, self._limit = repository.basic(), repository.by_id(), limit
        after = [bindparam("after", type_=BigInt)]
        page = select_page(self._selection, *conditions, keyset=self._keyset, after=after, limit=limit)
        self._page = CompiledSelect(page, database.engine.dialect)

    async def read(self, after: int) -> Page[Row]:
        """Return the first rows after an id; an empty page is the last one."""
        found = await self._database.rows(self._page, requirement=self._requirement, after=after)
        return page_from_rows(self._selection, found, self._keyset, self._limit)


class DistributedPages:
    """Reads pages of a table that Citus distributes, each from a range of ids.

    Without a range, each shard would send the next `limit` rows to the coordinator, which needs one in 32 of
    them. The range grows while few of its rows match.
    """

    def __init__(
        self,
        database: Database,
        repository: AnyRepository,
        conditions: Conditions,
        limit: int,
        requirement: Requirement | None,
    ) -> None:
        self._database, self._requirement = database, requirement
        self._limit = self._range = limit
        selection, keyset, id = repository.basic(), repository.by_id(), repository.model.id
        after, last = bindparam("after", type_=BigInt), bindparam("last", type_=BigInt)
        sizes = select_sizes(selection, *conditions, id <= last, keyset=keyset, after=[after], limit=limit)
        following = select(func.min(id).label("id")).where(id > after, *conditions)
        dialect = database.engine.dialect
        self._sizes = CompiledSelect(sizes, dialect)
        self._rows = CompiledSelect(select_rows(selection, is_one_of_keys(id, dialect)).order_by(id), dialect)
        self._first_after = CompiledSelect(following, dialect)

    async def read(self, after: int) -> Page[Row]:
        """Return the first rows after an id; an empty page is the last one."""
        while after < MAX_ID:
            last = min(after + self._range, MAX_ID)
            page = await self._read_range(after, last)
            if page.next_key:
                self._range = max(self._range // 2, self._limit)
                if page.rows:
                    return page
                # All of them were deleted after their sizes were read. An empty page would end the export.
                [after] = page.next_key
                continue
            if len(page.rows) * 2 < self._limit:
                self._range *= 2
            if page.rows:
                return Page(page.rows, [last])
            [row] = await self._query(self._first_after, after=last)
            if row[0] is None:
                break
            after = row[0] - 1
        return Page([], None)

    async def _read_range(self, after: int, last: int) -> Page[Row]:
        """Return the first rows of a range: their sizes are read first, then those that fit an answer."""
        found = await self._query(self._sizes, after=after, last=last)
        fitting = found[: min(self._limit, count_fitting(row.size for row in found))]
        rows = await self._query(self._rows, keys=[row.value for row in fitting]) if fitting else []
        return Page(rows, [fitting[-1].value] if len(fitting) < len(found) else None)

    async def _query(self, query: CompiledSelect, **values: Any) -> Sequence[Row]:
        return await self._database.rows(query, requirement=self._requirement, **values)
