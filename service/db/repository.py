"""Repository: what every entity has. It is given a session and never commits."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    ColumnExpressionArgument,
    Delete,
    Select,
    Subquery,
    Update,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.base import ExecutableOption

from service.db.base import BigInt, Entity, UtcDateTime, now
from service.db.dialect import listed, microseconds
from service.db.paging import Keyset, Page
from service.errors import NotFound, RosterError, VersionMismatch

# An answer has 3 MiB, as gRPC's clients refuse more than 4 unless told otherwise; some of it is for a
# page token, or for the 1000 ids of a batch that are missing or remain.
MAX_ROWS_BYTES = (3 << 20) - (16 << 10)

ModelT = TypeVar("ModelT", bound=Entity)


class Repository(Generic[ModelT]):
    """Rows of one model.

    `options` say which relationships come along; `size` is the SQL of a row's size in the answer,
    for those models whose rows can be too large for 1000 of them in one answer.
    """

    model: ClassVar[type[Any]]
    not_found: ClassVar[type[NotFound]]

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.options: Sequence[ExecutableOption] = ()
        self.size: ColumnElement[int] | None = None
        self.shows: Sequence[Any] = (self.model,)

    def as_columns(self) -> Self:
        """Let `get_many` and `list` return rows of columns, which cost half of what entities do."""
        self.shows = shown(self.model)  # type: ignore[arg-type]  # a type is hashable
        return self

    async def get(self, id: int) -> ModelT:
        """Return the row with this id; raises the entity's NotFound."""
        return await self.get_by(self.model.id == id)

    async def get_by(self, *conditions: ColumnElement[bool]) -> ModelT:
        """Return the one row that meets the conditions; raises the entity's NotFound."""
        row = await self.session.scalar(self._select().where(*conditions))
        if row is None:
            raise self.missing()
        await self._complete([row])
        return cast("ModelT", row)

    async def get_many(self, ids: Sequence[int]) -> list[ModelT | None]:
        """Return rows in the order asked, None for a missing one.

        The list is shorter than `ids` where the answer would be too large: the rest was not looked up.
        """
        wanted = listed(self.session, ids, BigInt)
        if self.size is not None:
            sizes = (
                select(wanted.c.value, wanted.c.position, func.coalesce(self.size, 0).label("size"))
                .outerjoin_from(wanted, self.model, self.model.id == wanted.c.value)
                .subquery()
            )
            wanted = _fitting(sizes, [sizes.c.position.asc()])
        rows = await self.session.execute(
            select(*self.shows, wanted.c.position)
            .options(*self.options)
            .outerjoin_from(wanted, self.model, self.model.id == wanted.c.value)
            .order_by(wanted.c.position)
        )
        found = [self._shown([row])[0] if row[0] is not None else None for row in rows]
        await self._complete([row for row in found if row is not None])
        return found

    async def list(
        self,
        *conditions: ColumnExpressionArgument[bool],
        keyset: Keyset | None = None,
        after: Sequence[Any] | None = None,
        limit: int,
    ) -> Page[ModelT]:
        """Return the rows that meet the conditions, in the keyset's order, from behind the key `after`.

        A page has at most `limit` rows, and fewer where the answer would be too large.
        """
        keyset = keyset or self.by_id()
        statement = self.select_page(*conditions, keyset=keyset, after=after, limit=limit)
        found = (await self.session.execute(statement)).all()
        page = self.page_of(found, keyset, limit)
        await self._complete(page.rows)
        return page

    @classmethod
    def by_id(cls) -> Keyset:
        """Return the order by id."""
        return Keyset([cls.model.__table__.c.id])

    def select_page(
        self,
        *conditions: ColumnExpressionArgument[bool],
        keyset: Keyset,
        after: Sequence[Any] | None,
        limit: int,
    ) -> Select[Any]:
        """Return the statement of a page: one row more than its limit tells whether another follows."""
        if after is not None:
            conditions = (*conditions, keyset.after(after))
        if self.size is None:
            return self._select().where(*conditions).order_by(*keyset.order()).limit(limit + 1)
        candidates = (
            select(self.model.id.label("value"), *keyset.columns, self.size.label("size"))
            .where(*conditions)
            .order_by(*keyset.order())
            .limit(limit + 1)
            .subquery()
        )
        fitting = _fitting(candidates, keyset.of(candidates).order())
        statement = self._select().join(fitting, fitting.c.value == self.model.id).order_by(*keyset.order())
        return statement.add_columns(fitting.c.total)

    def page_of(self, found: Sequence[Any], keyset: Keyset, limit: int) -> Page[Any]:
        """Return what the statement of a page found as that page."""
        if not found:
            return Page([], None)
        rows = self._shown(found)[:limit]
        total = len(found) if self.size is None else found[0].total
        return Page(rows, keyset.key_of(rows[-1]) if total > len(rows) else None)

    async def create(self, values: Mapping[str, Any]) -> ModelT:
        """Insert a row and return it."""
        created = await self.session.scalar(insert(self.model).values(**values).returning(self.model))
        return cast("ModelT", created)

    async def update(self, id: int, changes: Mapping[str, Any], version: int = 0) -> ModelT:
        """Change a row, count its version up, and return it.

        Raises the entity's NotFound, and VersionMismatch where `version` is neither 0 nor the row's.
        """
        statement = update(self.model).values(**changes, version=self.model.version + 1, updated_at=now())
        return await self._checked(statement, id, version)

    async def delete(self, id: int, version: int = 0) -> None:
        """Delete a row; raises as `update` does."""
        await self._checked(delete(self.model), id, version)

    async def _checked(self, statement: Update | Delete, id: int, version: int) -> ModelT:
        conditions = [self.model.id == id] + ([self.model.version == version] if version else [])
        changed = await self.session.scalar(
            statement.where(*conditions).returning(self.model),
            execution_options={"synchronize_session": False, "populate_existing": True},
        )
        if changed is None:
            raise await self._refusal(id)
        return cast("ModelT", changed)

    async def _refusal(self, id: int) -> RosterError:
        current = await self.session.scalar(select(self.model.version).where(self.model.id == id))
        if current is None:
            return self.missing()
        return VersionMismatch(
            f"the version is {current} by now; read again, and repeat the change if it still makes sense",
            field="version",
            version=current,
        )

    @classmethod
    def missing(cls) -> NotFound:
        """Return the error for a row that is not there."""
        return cls.not_found(f"there is no such {cls.model.__name__.lower()}")

    def _select(self) -> Select[Any]:
        return select(*self.shows).options(*self.options)

    def _shown(self, rows: Sequence[Any]) -> Sequence[Any]:
        return [row[0] for row in rows] if self.shows == (self.model,) else rows

    async def _complete(self, rows: Sequence[ModelT]) -> None:
        """Load what the options can't, with one statement for all rows."""


@cache
def shown(model: Any) -> Sequence[Any]:
    """Return the columns that are read unless more is asked for: all but the deferred ones.

    Times come as microseconds since 1970.
    """
    attributes = [column.class_attribute for column in inspect(model).column_attrs if not column.deferred]
    return [
        microseconds(column).label(column.key) if isinstance(column.type, UtcDateTime) else column
        for column in attributes
    ]


def _fitting(candidates: Subquery, order: Sequence[ColumnElement[Any]]) -> Subquery:
    """Return the first of the candidates, as many as one answer can hold, and how many there were in all."""
    running = func.sum(candidates.c.size).over(order_by=order, rows=(None, 0)).label("running")
    total = func.count().over().label("total")
    sums = select(candidates, running, total).subquery()
    return select(sums).where(sums.c.running <= MAX_ROWS_BYTES).subquery()
