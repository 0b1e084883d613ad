"""The portable writer: SQLAlchemy's executemany. SQLite's, whose writer is alone while it writes."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import Dialect, Integer, String, Table, bindparam, column, func, insert, select, table, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.types import TypeEngine

from service.db.base import Entity, now
from service.timeslice import map_in_slices, slices

ROWS_AT_ONCE = 250
# Where SQLite keeps the largest id ever used of each AUTOINCREMENT table.
SEQUENCES = table("sqlite_sequence", column("name", String), column("seq", Integer))


async def next_ids(session: AsyncSession, model: type[Entity], count: int) -> Sequence[int]:
    """Return the ids after the largest ever used; nobody else can take them before the commit."""
    last = await session.scalar(select(SEQUENCES.c.seq).where(SEQUENCES.c.name == model.__tablename__)) or 0
    return range(last + 1, last + 1 + count)


async def reserve_ids(session: AsyncSession, model: type[Entity], largest: int) -> None:
    """Move the sequence past an id; SQLite would do so with the first row, but ids are drawn before."""
    name = model.__tablename__
    moved = update(SEQUENCES).where(SEQUENCES.c.name == name).values(seq=func.max(SEQUENCES.c.seq, largest))
    if not (await session.execute(moved.returning(SEQUENCES.c.seq))).all():
        await session.execute(insert(SEQUENCES).values(name=name, seq=largest))


async def insert_rows(
    session: AsyncSession, model: type[Entity], columns: Mapping[str, Sequence[Any]], sort_key: str | None
) -> None:
    """Insert rows; raises IntegrityError.

    The driver gets tuples: SQLAlchemy would make a dict of each row, and another of its parameters.
    """
    connection = await session.connection()
    table = cast("Table", model.__table__)
    statement = (
        insert(table).values({name: bindparam(name) for name in columns}).compile(dialect=connection.dialect)
    )
    names = statement.positiontup or []
    bound = [await _bound(columns[name], table.c[name].type, connection.dialect) for name in names]
    rows = list(zip(*bound, strict=True))
    if sort_key:
        rows.sort(key=itemgetter(names.index(sort_key)))
    await connection.exec_driver_sql(str(statement), rows)


async def update_rows(
    session: AsyncSession, model: type[Entity], columns: Mapping[str, Sequence[Any]]
) -> int:
    """Set columns of the rows with the ids in `id`, whose versions grow by `times`; return how many.

    Those with another version than `expected`, where that is given and not 0, stay. Raises IntegrityError.
    """
    values: dict[str, Any] = {
        name: bindparam(f"new_{name}") for name in columns if name not in ("id", "times", "expected")
    }
    values |= {"version": model.version + bindparam("new_times"), "updated_at": now()}
    statement = update(model).where(model.id == bindparam("new_id")).values(values)
    if "expected" in columns:
        expected: Any = bindparam("new_expected")
        statement = statement.where((expected == 0) | (expected == model.version))
    connection = await session.connection()
    names, updated = [f"new_{name}" for name in columns], 0
    # Some at a time: SQLAlchemy prepares the parameters of a statement's rows at once, with 8 µs for each.
    async for some in slices(list(zip(*columns.values(), strict=True)), ROWS_AT_ONCE):
        parameters = [dict(zip(names, row, strict=True)) for row in some]
        updated += (await connection.execute(statement, parameters)).rowcount
    return updated


async def _bound(values: Sequence[Any], kind: TypeEngine[Any], dialect: Dialect) -> Sequence[Any]:
    process = kind.bind_processor(dialect)
    return await map_in_slices(process, values) if process else values
