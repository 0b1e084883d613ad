"""The pages of an export: all rows that match a filter, in id order."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, select

from service.consistency import Requirement
from service.db.base import BigInt
from service.db.compiled import CompiledSelect
from service.db.distribution import shard_count
from service.db.engine import Database
from service.db.paging import Page
from service.db.repository import Repository
from service.db.selection import Row, page_from_rows, select_page

MAX_ID = (1 << 63) - 1


class ExportPages:
    """Reads the pages of an export.

    If Citus distributes the table, each page is of a range of ids, which grows while few of its rows match.
    Without it, each shard would send the next `limit` rows to the coordinator, which needs one in 32 of them.
    """

    def __init__(
        self,
        database: Database,
        repository: type[Repository[Any, Any]],
        conditions: Sequence[ColumnElement[bool]],
        limit: int,
        requirement: Requirement | None,
    ) -> None:
        model, dialect = repository.model, database.engine.dialect
        self._database = database
        self._selection, self._keyset = repository.basic(), repository.by_id()
        self._limit = limit
        self._requirement = requirement
        self._is_distributed = shard_count(dialect, model) > 0
        self._range = limit
        after, last = bindparam("after", type_=BigInt), bindparam("last", type_=BigInt)
        page = select_page(
            self._selection,
            *conditions,
            keyset=self._keyset,
            after=[after],
            limit=limit,
            among=(model.id > after) & (model.id <= last) if self._is_distributed else None,
        )
        self._page = CompiledSelect(page, dialect)
        following = select(func.min(model.id).label("id")).where(model.id > after, *conditions)
        self._first_after = CompiledSelect(following, dialect)

    async def read(self, after: int) -> Page[Row]:
        """Return the first rows after an id; an empty page is the last one."""
        if not self._is_distributed:
            return await self._read(after)
        while after < MAX_ID:
            last = min(after + self._range, MAX_ID)
            page = await self._read(after, last=last)
            if page.next_key:
                self._range = max(self._range // 2, self._limit)
                return page
            if len(page.rows) * 2 < self._limit:
                self._range *= 2
            if page.rows:
                return Page(page.rows, [last])
            [row] = await self._database.rows(self._first_after, requirement=self._requirement, after=last)
            if row[0] is None:
                break
            after = row[0] - 1
        return Page([], None)

    async def _read(self, after: int, **values: Any) -> Page[Row]:
        found = await self._database.rows(self._page, requirement=self._requirement, after=after, **values)
        return page_from_rows(self._selection, found, self._keyset, self._limit)
