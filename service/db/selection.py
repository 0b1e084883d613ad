"""Selections: what a read returns of each row, and the statements that read it.

Pure functions that build statements; the repository runs them on a session, pages and exports on the driver.

A row has the columns of its selection first, in their order, and by name. Times are microseconds since 1970.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    ColumnExpressionArgument,
    String,
    Subquery,
    func,
    inspect,
    literal,
    select,
)

from service.db.base import Column, Entity, Expression, Query, ReadSession, UtcDateTime, column_names
from service.db.dialect import microseconds, octets
from service.db.paging import Keyset, Page, SortKey

# An answer has at most 3 MiB: by default the clients of gRPC refuse more than 4. Some of it is left for the
# page token, or for the 1000 ids of a batch that are missing or remain.
MAX_ROWS_BYTES = (3 << 20) - (16 << 10)
# The bytes of a message besides its texts: tags, lengths, ids, times; rounded up.
FIXED_BYTES = 100


class Row(Protocol):
    """A row as SQLAlchemy or the driver returns it: its columns by position and by name."""

    @property
    def id(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, position: int | slice) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...


Related = Callable[[ReadSession, Sequence[Row]], Awaitable[Sequence[Any]]]


@dataclass(frozen=True, eq=False)
class Selection:
    """The columns that a read returns of each row of a model, and how to read them.

    `size` is the SQL for the bytes of a row in an answer; None if 1000 of the largest rows fit. `join` is the
    relationship whose columns are added to each row. `add_related` reads rows that belong to those found,
    with one statement for all of them, and returns both. If the `related` rows are on several servers,
    `if_distributed` takes the place of the selection; its `add_related` may return fewer rows, those that fit
    an answer.
    """

    model: type[Entity]
    columns: Sequence[Expression]
    size: ColumnElement[int] | None = None
    join: Column | None = None
    add_related: Related | None = None
    related: type[Entity] | None = None
    if_distributed: "Selection | None" = None


@cache
def readable_columns(model: type[Entity]) -> Sequence[Expression]:
    """Return the columns of a model that reads select: all but the deferred ones."""
    attributes = inspect(model).attrs
    return [_readable(attributes[name].class_attribute) for name in column_names(model)]


@cache
def basic_selection(model: type[Entity]) -> Selection:
    """Return the selection of the columns of a model."""
    return Selection(model, readable_columns(model))


def _readable(column: Column) -> Expression:
    is_time = isinstance(column.type, UtcDateTime)
    return microseconds(column).label(column.key) if is_time else column


def columns_by_name(model: type[Entity], *names: str) -> Mapping[str, Column]:
    """Return columns of a model by name, as filters name them."""
    return {name: getattr(model, name) for name in names}


def size_of(columns: Sequence[Expression]) -> ColumnElement[int]:
    """Return the SQL for the bytes that a row of these columns takes in an answer, rounded up."""
    size: ColumnElement[int] = literal(FIXED_BYTES)
    for column in columns:
        if isinstance(column.type, String):
            size += _text_size(column)
    return size


def _text_size(column: Expression) -> ColumnElement[int]:
    # The size of a missing row stays null: only the nulls of nullable columns are empty texts.
    is_nullable = column.expression.nullable
    return func.coalesce(octets(column), 0) if is_nullable else octets(column)


def select_rows(selection: Selection, *conditions: ColumnExpressionArgument[bool]) -> Query:
    """Return the statement that reads the rows that meet the conditions."""
    statement = select(*selection.columns).select_from(selection.model).where(*conditions)
    return statement if selection.join is None else statement.join(selection.join)


def select_listed(selection: Selection, listed: Subquery) -> Query:
    """Return the statement that reads one row for each listed id, in the order of the list.

    A row of nulls stands for a missing id. If the answer would be too large, the last rows are left out.
    """
    model = selection.model
    if selection.size is not None:
        sizes = select(listed.c.value, listed.c.position, func.coalesce(selection.size, 0).label("size"))
        sizes = sizes.outerjoin_from(listed, model, model.id == listed.c.value)
        candidates = sizes.subquery()
        listed = _fitting(candidates, [candidates.c.position.asc()])
    statement = select(*selection.columns, listed.c.position)
    statement = statement.outerjoin_from(listed, model, model.id == listed.c.value)
    if selection.join is not None:
        statement = statement.outerjoin(selection.join)
    return statement.order_by(listed.c.position)


def select_page(
    selection: Selection,
    *conditions: ColumnExpressionArgument[bool],
    keyset: Keyset,
    after: SortKey | None,
    limit: int | BindParameter[int],
) -> Query:
    """Return the statement of a page. It reads one row more than the limit, to know whether others follow."""
    model = selection.model
    if after is not None:
        conditions = (*conditions, keyset.after(after))
    if selection.size is None:
        return select_rows(selection, *conditions).order_by(*keyset.order()).limit(limit + 1)
    candidates = _select_sizes(selection, selection.size, conditions, keyset, limit).subquery()
    fitting = _fitting(candidates, keyset.of(candidates).order())
    statement = select_rows(selection).join(fitting, fitting.c.value == model.id)
    return statement.order_by(*keyset.order()).add_columns(fitting.c.total)


def select_sizes(
    selection: Selection,
    *conditions: ColumnExpressionArgument[bool],
    keyset: Keyset,
    after: SortKey | None,
    limit: int,
) -> Query:
    """Return the statement that reads the keys and the sizes of the rows of a page, and of one more."""
    if after is not None:
        conditions = (*conditions, keyset.after(after))
    size = literal(0) if selection.size is None else selection.size
    return _select_sizes(selection, size, conditions, keyset, limit)


def _select_sizes(
    selection: Selection,
    size: ColumnElement[int],
    conditions: Sequence[ColumnExpressionArgument[bool]],
    keyset: Keyset,
    limit: int | BindParameter[int],
) -> Query:
    columns: list[Expression] = [selection.model.id.label("value"), *keyset.columns, size.label("size")]
    return select(*columns).where(*conditions).order_by(*keyset.order()).limit(limit + 1)


def count_fitting(sizes: Iterable[int]) -> int:
    """Return how many rows of these sizes fit one answer together."""
    return sum(total <= MAX_ROWS_BYTES for total in accumulate(sizes))


def page_from_rows(selection: Selection, found: Sequence[Row], keyset: Keyset, limit: int) -> Page[Row]:
    """Return the page that the rows of its statement make."""
    if not found:
        return Page([], None)
    rows = found[:limit]
    total = len(found) if selection.size is None else found[0].total
    has_more = total > len(rows)
    return Page(rows, keyset.key_of(rows[-1]) if has_more else None)


def _fitting(candidates: Subquery, order: Sequence[Expression]) -> Subquery:
    """Return the first candidates that fit one answer together, and `total`, the number of all candidates."""
    running = func.sum(candidates.c.size).over(order_by=order, rows=(None, 0)).label("running")
    total = func.count().over().label("total")
    sums = select(candidates, running, total).subquery()
    return select(sums).where(sums.c.running <= MAX_ROWS_BYTES).subquery()
