"""SQL that differs between PostgreSQL and SQLite."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    Dialect,
    Integer,
    Subquery,
    bindparam,
    column,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from service.db.arrays import ArrayText
from service.db.base import Base, BigInt, Column, ColumnType, Expression, KeyValue, model_of
from service.db.distribution import is_distributed


def is_sqlite(session: AsyncSession) -> bool:
    """Return whether the session is connected to SQLite."""
    return session.get_bind().dialect.name == "sqlite"


def insert(session: AsyncSession, model: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """Return an INSERT with ON CONFLICT, which both databases have."""
    return sqlite.insert(model) if is_sqlite(session) else postgresql.insert(model)


def values_table(session: AsyncSession, values: Sequence[KeyValue], kind: ColumnType) -> Subquery:
    """Return the values as a table with the columns `value` and `position`.

    The values are one parameter, so that one prepared statement serves any number of them.
    """
    if is_sqlite(session):
        each = func.json_each(json.dumps(values)).table_valued(column("value", kind), column("key", Integer))
        return select(each.c.value, each.c.key.label("position")).subquery()
    array = bindparam(None, values, type_=ArrayText(kind), unique=True)
    rows = func.unnest(array).table_valued(column("value", kind), with_ordinality="position").render_derived()
    return select(rows.c.value, rows.c.position).subquery()


def is_one_of(session: AsyncSession, column: Column, values: Sequence[KeyValue]) -> ColumnElement[bool]:
    """Return the condition that a column has one of the values, which are one parameter.

    Not `= ANY(array)`: PostgreSQL scans a small table, or a new one without statistics, and would read the
    text of the array again for each row. The delete of 4,000 of 12,000 rows took 8 s.
    """
    if is_distributed(session, model_of(column)):
        return any_of(column, values)
    listed = values_table(session, values, column.type)
    return column.in_(select(listed.c.value))


def any_of(column: Column, values: Sequence[KeyValue]) -> ColumnElement[bool]:
    """Return the same condition in the form from which Citus sees which shards have the rows."""
    return column == func.any(bindparam(None, list(values), type_=ARRAY(column.type), unique=True))


def is_one_of_keys(column: Column, dialect: Dialect) -> ColumnElement[bool]:
    """Return the condition that a column has one of the values of the parameter `keys`."""
    if dialect.name == "sqlite":
        each = func.json_each(bindparam("keys", type_=JSON)).table_valued("value")
        return column.in_(select(each.c.value))
    return column == func.any(bindparam("keys", type_=ARRAY(column.type)))


async def ids_of(
    session: AsyncSession, key: Column, values: Sequence[KeyValue], kind: ColumnType
) -> list[int | None]:
    """Return, for each value of a unique column, the id of the row that has it.

    The statement looks up each value in the index, never scans the table, and returns one array instead of
    thousands of rows.
    """
    if not values:
        return []
    connection = await session.connection()
    if is_distributed(session, model_of(key)):  # then the only unique column is the id
        existing = set((await connection.execute(select(key).where(any_of(key, values)))).scalars())
        return [cast("int", value) if value in existing else None for value in values]
    wanted = values_table(session, values, kind)
    found = select(key.class_.id).where(key == wanted.c.value).scalar_subquery()
    collect: Callable[[Expression], Expression] = (
        func.json_group_array if is_sqlite(session) else partial(func.array_agg, type_=ARRAY(BigInt))
    )
    ids = await connection.scalar(select(collect(found)).select_from(wanted))
    return json.loads(ids) if isinstance(ids, str) else cast("list[int | None]", ids)


class octets(FunctionElement[int]):  # noqa: N801  (reads as SQL)
    """The size of a text in bytes of UTF-8; PostgreSQL returns it without reading a long text."""

    type = Integer()
    inherit_cache = True


@compiles(octets)
def _octets(element: octets, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(octets, "sqlite")
def _octets_sqlite(element: octets, compiler: SQLCompiler, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


class microseconds(FunctionElement[int]):  # noqa: N801  (reads as SQL)
    """A time as microseconds since 1970; a datetime would take 1 µs to create and 0.5 µs to convert."""

    type = BigInteger()
    inherit_cache = True


EPOCH = "timestamptz '1970-01-01 00:00:00+00'"
FIRST = "timestamptz '0001-01-01 00:00:00+00'"
LAST = "timestamptz '9999-12-31 23:59:59.999999+00'"


@compiles(microseconds)
def _microseconds(element: microseconds, compiler: SQLCompiler, **options: Any) -> str:
    # asyncpg stores the smallest and the largest datetime as infinities, which have no number.
    time = f"greatest(least({compiler.process(element.clauses, **options)}, {LAST}), {FIRST})"
    # Citus has only immutable functions in RETURNING. The epoch of a time depends on the time zone, as far as
    # PostgreSQL knows; that of an interval does not, and takes a tenth less.
    return f"(extract(epoch FROM {time} - {EPOCH}) * 1000000)::bigint"


@compiles(microseconds, "sqlite")
def _microseconds_sqlite(element: microseconds, compiler: SQLCompiler, **options: Any) -> str:
    time = compiler.process(element.clauses, **options)  # its fraction always has six digits
    return f"(strftime('%s', substr({time}, 1, 19)) * 1000000 + substr({time}, 21))"
