"""A listing: what a request's filter, order and token say, as the parts of a query."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, bindparam
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.base import BigInt
from service.db.driver import DriverQuery
from service.db.engine import Database
from service.db.filters import condition, parse_order
from service.db.paging import Keyset, Page, decode_token, encode_token, fingerprint, page_size
from service.db.repository import ModelT, Repository

Column = ColumnElement[Any]

# SQLAlchemy keeps the last 500 to 750 statements. One with a filter of 2,000 characters takes 0.75 MiB.
MAX_CACHEABLE_FILTER = 200  # characters


@dataclass(frozen=True)
class Query:
    """Which rows, in which order, from where, and how many."""

    conditions: list[ColumnElement[bool]]
    keyset: Keyset
    after: list[Any] | None
    limit: int
    fingerprint: bytes = b""
    is_cacheable: bool = True  # SQLAlchemy may keep the compiled statement

    async def page(self, repository: Repository[ModelT]) -> tuple[Sequence[ModelT], str]:
        """Return the rows and the token of the page behind them, "" where there is none."""
        if not self.is_cacheable:
            await repository.session.connection(execution_options={"compiled_cache": None})
        found: Page[ModelT] = await repository.list(
            *self.conditions, keyset=self.keyset, after=self.after, limit=self.limit
        )
        return found.rows, encode_token(self.fingerprint, found.next_key)


@dataclass(frozen=True)
class Listing:
    """What can be asked of one entity: the fields of its filters, the keys of its orders."""

    name: str
    filterable: Mapping[str, Column]
    sortable: Mapping[str, Sequence[Column]]
    normalise: Mapping[str, Callable[[str], str]] = field(default_factory=dict)

    async def conditions(self, text: str) -> list[ColumnElement[bool]]:
        """Return a filter as conditions; raises InvalidFilter."""
        parsed = await condition(text, self.filterable, self.normalise)
        return [] if parsed is None else [parsed]

    async def query(self, request: Any, *scope: ColumnElement[bool], scope_key: int = 0) -> Query:
        """Return the query of a List request.

        Raises InvalidFilter, InvalidOrder, InvalidPageToken, and InvalidField for the page size.
        """
        order = parse_order(request.order_by, self.sortable)
        keyset = Keyset(self.sortable[order.field], order.descending)
        tied_to = fingerprint(self.name, request.filter, *order, scope_key)
        return Query(
            conditions=[*scope, *await self.conditions(request.filter)],
            keyset=keyset,
            after=decode_token(tied_to, request.page_token, keyset.columns),
            limit=page_size(request.page_size),
            fingerprint=tied_to,
            is_cacheable=len(request.filter) <= MAX_CACHEABLE_FILTER,
        )


async def batches(
    database: Database,
    repository: Callable[[AsyncSession], Repository[ModelT]],
    conditions: Sequence[ColumnElement[bool]],
    after_id: int,
    limit: int,
) -> AsyncGenerator[Sequence[Any]]:
    """Yield the columns of every row that meets the conditions, in id order, some rows at a time.

    Each batch is read by a session of its own, so that a slow reader holds no connection; one batch is
    read while the one before it is written.
    """
    async with database.read() as session:  # connects with the first statement only
        reader = repository(session).as_columns()
    keyset = reader.by_id()
    after = bindparam("after", type_=BigInt)
    page = reader.select_page(*conditions, keyset=keyset, after=[after], limit=limit)
    query = DriverQuery(page, database.engine.dialect)

    async def read(after: int) -> Page[Any]:
        async with database.read() as session:
            found = await query.rows(await session.connection(), after=after)
        return reader.page_of(found, keyset, limit)

    reading = asyncio.create_task(read(after_id))
    try:
        while (found := await reading).rows:
            if found.next_key:
                reading = asyncio.create_task(read(*found.next_key))
            await database.loop_turns.next(len(found.rows))
            yield found.rows
            if not found.next_key:
                return
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
