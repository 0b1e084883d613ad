"""Writes to SQLite: statements of many rows. There is no other writer meanwhile."""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Dialect,
    Integer,
    String,
    Table,
    bindparam,
    column,
    func,
    insert,
    select,
    table,
    type_coerce,
    update,
)

from service.db.base import BigInt, ColumnType, Entity, Expression, Session, now
from service.db.bulk.batch import BatchColumns
from service.timeslice import map_in_slices, slices

ROWS_AT_ONCE = 250
# Half of a full message. A load took the server 9.8 µs a row, with 1,000 rows 11.4, and one by one 13.8.
ROWS_PER_STATEMENT = 2500
MAX_PARAMETERS = 32_766  # of a statement: https://sqlite.org/limits.html
TIMES = ("created_at", "updated_at")
# The table in which SQLite keeps the largest id ever used of each AUTOINCREMENT table.
SEQUENCES = table("sqlite_sequence", column("name", String), column("seq", Integer))


async def next_ids(session: Session, model: type[Entity], count: int) -> Sequence[int]:
    """Return the ids after the largest ever used. No other writer can take them before the commit."""
    last = await session.scalar(select(SEQUENCES.c.seq).where(SEQUENCES.c.name == model.__tablename__)) or 0
    return range(last + 1, last + 1 + count)


async def reserve_ids(session: Session, model: type[Entity], largest: int) -> None:
    """Move the sequence past an id. SQLite would do so on insert, but other ids are drawn before that."""
    name = model.__tablename__
    moved = update(SEQUENCES).where(SEQUENCES.c.name == name).values(seq=func.max(SEQUENCES.c.seq, largest))
    if not (await session.execute(moved.returning(SEQUENCES.c.seq))).all():
        await session.execute(insert(SEQUENCES).values(name=name, seq=largest))


async def insert_rows(
    session: Session,
    model: type[Entity],
    columns: BatchColumns,
    sort_key: str | None,  # noqa: ARG001  (there is no other writer to meet in another order)
) -> None:
    """Insert rows; raises IntegrityError.

    The driver releases the interpreter's lock while a statement runs, and waits for it after each. So a
    statement inserts many rows: with a statement for each, this thread waits for the event loop's 5,000
    times. The driver gets plain values. SQLAlchemy would make a dict of each row.
    """
    connection = await session.connection()
    table = cast("Table", model.__table__)
    # The same time for all rows. As the columns' default it would be formatted for each: 2 µs a row.
    at = await connection.scalar(select(type_coerce(now(), String)))
    times = [name for name in TIMES if name not in columns]
    names, one_row, many_rows, many = _inserts(connection.dialect, table, (*columns, *times))
    bound = {name: await _bound(columns[name], table.c[name].type, connection.dialect) for name in columns}
    bound |= dict.fromkeys(times, [at] * len(next(iter(bound.values()))))
    rows = list(zip(*(bound[name] for name in names), strict=True))
    whole = len(rows) - len(rows) % many
    for start in range(0, whole, many):
        values = tuple(chain.from_iterable(rows[start : start + many]))
        await connection.exec_driver_sql(many_rows, values)
    # The rest one by one: a statement for each number of rows would fill the driver's cache of statements.
    if rest := rows[whole:]:
        await connection.exec_driver_sql(one_row, rest)


@lru_cache(64)
def _inserts(dialect: Dialect, table: Table, names: Sequence[str]) -> tuple[Sequence[str], str, str, int]:
    """Return the columns in the order of their parameters, the INSERTs of one and many rows, and how many."""
    values: dict[str, Expression] = {name: bindparam(name) for name in names}
    statement = insert(table).values(values).compile(dialect=dialect)
    one_row = str(statement)
    row = one_row.rpartition(" VALUES ")[2]
    many = min(ROWS_PER_STATEMENT, MAX_PARAMETERS // len(names))
    return statement.positiontup or [], one_row, ", ".join([one_row, *[row] * (many - 1)]), many


async def lock_rows_by_id(
    session: Session, model: type[Entity], ids: Sequence[int], expected: Sequence[int]
) -> int:
    """Return how many of the rows with these ids have the version expected; 0 is any. There is no lock."""
    pairs = json.dumps(list(zip(ids, expected, strict=True)))
    each = func.json_each(pairs).table_valued(column("value", String))
    id, version = (func.json_extract(each.c.value, path) for path in ("$[0]", "$[1]"))
    found = select(func.count()).select_from(each).join(model, model.id == id)
    connection = await session.connection()
    counted = await connection.execute(found.where((version == 0) | (version == model.version)))
    return counted.scalar_one()


async def update_rows(
    session: Session,
    model: type[Entity],
    ids: Sequence[int],
    columns: BatchColumns,
    *,
    increments: Sequence[int],
    expected: Sequence[int] | None = None,
) -> int:
    """Set columns of the rows with these ids, add `increments` to their versions; return how many there were.

    With `expected`, a row with another version is left as it is, unless 0 is expected. Raises IntegrityError.
    """
    # The parameters of the entity's columns are numbered, so that no column of an entity can have the name
    # of one of the three that control the update.
    values: dict[str, Expression] = {
        name: bindparam(f"_column_{number}", type_=model.__table__.c[name].type)
        for number, name in enumerate(columns)
    }
    values |= {"version": model.version + bindparam("_increment"), "updated_at": now()}
    statement = update(model).where(model.id == bindparam("_id")).values(values)
    names = [*(f"_column_{number}" for number in range(len(columns))), "_id", "_increment"]
    given = [*columns.values(), ids, increments]
    if expected is not None:
        wanted: ColumnElement[int] = bindparam("_expected", type_=BigInt)
        statement = statement.where((wanted == 0) | (wanted == model.version))
        names.append("_expected")
        given.append(expected)
    connection = await session.connection()
    updated = 0
    # Some rows at a time: SQLAlchemy prepares all parameters of a statement at once, and takes 8 µs a row.
    async for some in slices(list(zip(*given, strict=True)), ROWS_AT_ONCE):
        parameters = [dict(zip(names, row, strict=True)) for row in some]
        updated += (await connection.execute(statement, parameters)).rowcount
    return updated


async def _bound(values: Sequence[Any], kind: ColumnType, dialect: Dialect) -> Sequence[Any]:
    # Of the type as SQLite has it. The generic type would leave a datetime to the driver, which writes whole
    # seconds without a fraction; texts of two forms are not in the order of their times.
    process = kind.dialect_impl(dialect).bind_processor(dialect)
    return await map_in_slices(process, values) if process else values
