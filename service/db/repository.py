"""Repository: the reads and writes that all entities have."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sqlalchemy import ColumnElement, Select, Update, delete, func, insert, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from roster.errors import NotFound, RosterError, VersionMismatch
from service.db.answers import erase_answers_about, exclude_references, prepare_cascade
from service.db.base import BigInt, Column, Entity, ReadSession, Session, Values, now
from service.db.dialect import any_of, values_table
from service.db.distribution import is_distributed
from service.db.filters import condition, parse_order
from service.db.paging import Keyset, ListQuery, Page, decode_token, fingerprint, page_size
from service.db.selection import (
    Row,
    Selection,
    basic_selection,
    count_fitting,
    page_from_rows,
    select_listed,
    select_page,
    select_rows,
    select_sizes,
)
from service.db.token_keys import TokenKeys

ModelT = TypeVar("ModelT", bound=Entity)
SessionT = TypeVar("SessionT", bound=ReadSession)


class ListRequest(Protocol):
    """The fields of every List request."""

    page_size: int
    page_token: str
    filter: str
    order_by: str


# SQLAlchemy keeps the last 500 to 750 statements. One with a filter of 2,000 characters takes 0.75 MiB.
MAX_CACHEABLE_FILTER = 200  # characters


class Repository(Generic[ModelT, SessionT]):
    """The rows of one model. A repository is given a session and never commits.

    Writes need a session of `Database.begin()`: through one of `Database.read()` they are type errors.
    """

    model: type[ModelT]
    not_found: type[NotFound]
    # The columns for filters and orders. By field, `normalise` has the functions for texts in filters, and
    # `spellings` those that return what to look for in place of a whole text.
    filterable: ClassVar[Mapping[str, Column]]
    sortable: ClassVar[Mapping[str, Sequence[Column]]]
    normalise: ClassVar[Mapping[str, Callable[[str], str]]] = {}
    spellings: ClassVar[Mapping[str, Callable[[str], Sequence[str]]]] = {}

    def __init__(self, session: SessionT) -> None:
        self.session = session

    @classmethod
    def basic(cls) -> Selection:
        """Return what reads and writes return by default: the columns of the model."""
        return basic_selection(cls.model)

    async def get(self, id: int, selection: Selection | None = None) -> Row:
        """Return the row with this id; raises the entity's NotFound."""
        return await self.get_by(self.model.id == id, selection=selection)

    async def get_by(self, *conditions: ColumnElement[bool], selection: Selection | None = None) -> Row:
        """Return the only row that meets the conditions; raises the entity's NotFound."""
        selection = self._selection(selection)
        rows = (await self.session.execute(select_rows(selection, *conditions))).all()
        if not rows:
            raise self.missing()
        [row] = await self._add_related(selection, rows)
        return row

    async def get_many(self, ids: Sequence[int], selection: Selection | None = None) -> list[Row | None]:
        """Return the rows with these ids in their order, None for each that is missing.

        If the answer would be too large, the list is shorter than `ids`.
        """
        selection = self._selection(selection)
        if is_distributed(self.session, self.model):
            return await self._get_many_distributed(ids, selection)
        statement = select_listed(selection, values_table(self.session, ids, BigInt))
        rows = (await self.session.execute(statement)).all()
        present = [row for row in rows if row.id is not None]
        found = await self._add_related(selection, present)
        by_id = {row.id: result for row, result in zip(present, found, strict=False)}
        # If they are fewer, the others did not fit the answer, nor do the missing ids after them.
        first_left_out = present[len(found)] if len(found) < len(present) else None
        return [by_id.get(row.id) for row in takewhile(lambda row: row is not first_left_out, rows)]

    async def page(self, query: ListQuery, selection: Selection | None = None) -> Page[Row]:
        """Return a page of rows, which is shorter than its limit if the answer would be too large."""
        selection = self._selection(selection)
        if not query.is_cacheable:
            await self._compile_once()
        if is_distributed(self.session, self.model):
            return await self._page_of_distributed(query, selection)
        statement = select_page(
            selection, *query.conditions, keyset=query.keyset, after=query.after, limit=query.limit
        )
        found = (await self.session.execute(statement)).all()
        page = page_from_rows(selection, found, query.keyset, query.limit)
        rows = await self._add_related(selection, page.rows)
        is_cut = len(rows) < len(page.rows)
        return Page(rows, query.keyset.key_of(page.rows[len(rows) - 1]) if is_cut else page.next_key)

    async def _get_many_distributed(self, ids: Sequence[int], selection: Selection) -> list[Row | None]:
        """Return the rows in two statements: the sizes, and then the rows that fit.

        Citus would copy a table that it joins to a list to the coordinator.
        """
        if selection.size is not None:
            sized = select(self.model.id, selection.size).where(any_of(self.model.id, ids))
            sizes = {row[0]: row[1] for row in await self.session.execute(sized)}
            ids = ids[: count_fitting(sizes.get(id, 0) for id in ids)]
        by_id = await self._rows_by_id(selection, ids)
        return [by_id.get(id) for id in ids]

    async def _page_of_distributed(self, query: ListQuery, selection: Selection) -> Page[Row]:
        """Return a page in two statements. Citus would run one as a join, and send all ids to each shard."""
        sized = select_sizes(
            selection, *query.conditions, keyset=query.keyset, after=query.after, limit=query.limit
        )
        found = (await self.session.execute(sized)).all()
        fitting = found[: min(query.limit, count_fitting(row.size for row in found))]
        by_id = await self._rows_by_id(selection, [row.value for row in fitting])
        rows = [by_id[row.value] for row in fitting if row.value in by_id]
        return Page(
            await self._add_related(selection, rows),
            query.keyset.key_of(fitting[-1]) if len(fitting) < len(found) else None,
        )

    async def _rows_by_id(self, selection: Selection, ids: Sequence[int]) -> dict[int, Row]:
        if not ids:
            return {}
        rows = (await self.session.execute(select_rows(selection, any_of(self.model.id, ids)))).all()
        return {row.id: row for row in rows}

    async def count(
        self, conditions: Sequence[ColumnElement[bool]], limit: int, *, is_cacheable: bool
    ) -> int:
        """Return how many rows meet the conditions; the count stops at the limit."""
        if not is_cacheable:
            await self._compile_once()
        counted = select(self.model.id).where(*conditions).limit(limit).subquery()
        return (await self.session.execute(select(func.count()).select_from(counted))).scalar_one()

    @classmethod
    async def list_query(
        cls, request: ListRequest, token_keys: TokenKeys, *scope: ColumnElement[bool], scope_key: int = 0
    ) -> ListQuery:
        """Return the query of a List request, within a scope whose key ties the page tokens to it.

        Raises InvalidFilter, InvalidOrder, InvalidPageToken, and InvalidField for the page size.
        """
        order = parse_order(request.order_by, cls.sortable)
        keyset = cls._keyset(order.field, order.descending)
        listing = fingerprint(cls.model.__tablename__, request.filter, *order, scope_key)
        conditions, limit = await cls.conditions(request.filter), page_size(request.page_size)
        cipher = await token_keys.cipher() if keyset.has_texts else None
        return ListQuery(
            conditions=[*scope, *conditions],
            keyset=keyset,
            after=decode_token(listing, request.page_token, keyset.columns, cipher),
            limit=limit,
            fingerprint=listing,
            cipher=cipher,
            is_cacheable=is_cacheable(request.filter),
        )

    @classmethod
    async def conditions(cls, text: str) -> list[ColumnElement[bool]]:
        """Return a filter as conditions; raises InvalidFilter."""
        parsed = await condition(text, cls.filterable, cls.normalise, cls.spellings)
        return [] if parsed is None else [parsed]

    @classmethod
    @cache
    def _keyset(cls, field: str, descending: bool) -> Keyset:
        return Keyset(cls.sortable[field], descending)

    @classmethod
    def by_id(cls) -> Keyset:
        """Return the order by id."""
        return Keyset([cls.model.__table__.c.id])

    async def create(self: "Repository[ModelT, Session]", values: Values) -> Row:
        """Insert a row and return it."""
        statement = insert(self.model).values(**values).returning(*self.basic().columns)
        return (await self.session.execute(statement)).one()

    async def update(self: "Repository[ModelT, Session]", id: int, changes: Values, version: int = 0) -> Row:
        """Update a row, increment its version, and return it.

        Raises the entity's NotFound, and VersionMismatch if `version` is neither 0 nor the row's version.
        """
        statement = self._update(changes).returning(*self.basic().columns)
        return await self._write_one(statement, id, version)

    async def delete(self: "Repository[ModelT, Session]", id: int, version: int = 0) -> None:
        """Delete a row, and erase the answers about it and about the rows that are deleted with it.

        Raises the same errors as `update`.
        """
        await self.lock_to_delete(id, version)
        await exclude_references(self.session, self.model, [id])
        await erase_answers_about(self.session, self.model, [id])
        await self.session.execute(
            delete(self.model).where(self.model.id == id),
            execution_options={"synchronize_session": False},
        )

    async def lock_to_delete(self: "Repository[ModelT, Session]", id: int, version: int = 0) -> None:
        """Lock a row that is to be deleted; raises the same errors as `update`.

        The lock waits for writes of the row, and of rows that refer to it. The next statements see them. A
        dry run does no more: to delete a row and roll that back would cost as much as to delete it, and a
        user can have a million posts.
        """
        await prepare_cascade(self.session, self.model)
        await self._write_one(select(self.model.id).with_for_update(), id, version)

    def _update(self, changes: Values) -> Update:
        """Return the statement that changes rows and increments their versions."""
        return update(self.model).values(**changes, version=self.model.version + 1, updated_at=now())

    async def _write_one(
        self: "Repository[ModelT, Session]",
        statement: ReturningUpdate[Any] | Select[Any],
        id: int,
        version: int,
    ) -> Row:
        """Update or lock a row."""
        conditions = [self.model.id == id]
        if version:
            conditions.append(self.model.version == version)
        written = await self.session.execute(
            statement.where(*conditions),
            execution_options={"synchronize_session": False},
        )
        row: Row | None = written.one_or_none()
        if row is None:
            raise await self._write_error(id)
        return row

    async def _write_error(self, id: int) -> RosterError:
        """Return the reason why no row was written."""
        current = await self.session.scalar(select(self.model.version).where(self.model.id == id))
        if current is None:
            return self.missing()
        return VersionMismatch.of(current)

    @classmethod
    def missing(cls) -> NotFound:
        """Return the error for a row that does not exist."""
        return cls.not_found(f"this {cls._name()} does not exist")

    @classmethod
    def _name(cls) -> str:
        return cls.model.__name__.lower()

    async def _compile_once(self) -> None:
        """Keep the statements of this session out of SQLAlchemy's cache."""
        await self.session.connection(execution_options={"compiled_cache": None})

    def _selection(self, selection: Selection | None) -> Selection:
        """Return the selection for the database of the session; by default, the basic one."""
        selection = selection or self.basic()
        if selection.related and is_distributed(self.session, selection.related):
            return selection.if_distributed or selection
        return selection

    async def _add_related(self, selection: Selection, rows: Sequence[Row]) -> Sequence[Row]:
        if selection.add_related is None or not rows:
            return rows
        return await selection.add_related(self.session, rows)


def is_cacheable(filter_text: str) -> bool:
    """Return whether SQLAlchemy may keep the compiled statement of a filter."""
    return len(filter_text) <= MAX_CACHEABLE_FILTER
