"""Locks on several rows, in the order of their ids.

Citus refuses FOR UPDATE for rows on several servers. There, an update that changes nothing takes the locks,
in any order, and writes each row once more. Citus finds the deadlocks that follow, and runs one such update
of a table at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import ColumnElement, Text, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.db.base import BigInt, Column, ColumnType, Entity, KeyValue, Session, model_of
from service.db.dialect import any_of, values_table
from service.db.distribution import is_distributed

# Of rows to update, to delete, and to refer to. Only the second prevents new rows that refer to them.
# https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
Lock: TypeAlias = Mapping[str, bool]
NO_KEY_UPDATE: Lock = {"key_share": True}
UPDATE: Lock = {}
KEY_SHARE: Lock = {"read": True, "key_share": True}


async def lock_rows(
    session: Session,
    key: Column,
    values: Sequence[KeyValue | None],
    *columns: Column,
    lock: Lock = NO_KEY_UPDATE,
) -> Sequence[Sequence[Any]]:
    """Lock the rows that have one of the values, in id order; return their key and the columns.

    The locks last until the transaction ends. SQLite ignores them: its writer is alone.
    """
    given = sorted({value for value in values if value is not None})
    if not given:
        return []
    model = model_of(key)
    # Through the connection: a session would look for entities in each row.
    connection = await session.connection()
    if is_distributed(session, model):
        locking = _update_nothing(model, any_of(key, given)).returning(key, *columns)
        return sorted((await connection.execute(locking)).all())
    wanted = values_table(session, given, type_of(given))
    rows = (
        select(key, *columns)
        .join(wanted, wanted.c.value == key)
        .order_by(model.id)
        .with_for_update(of=model, **lock)
    )
    return (await connection.execute(rows)).all()


async def lock_where(
    session: AsyncSession, model: type[Entity], condition: ColumnElement[bool], limit: int | None = None
) -> int:
    """Lock the rows that meet a condition for a delete, at most `limit`; return how many these are."""
    rows = select(model.id).where(condition).order_by(model.id).limit(limit)
    connection = await session.connection()
    if is_distributed(session, model):
        limited = condition if limit is None else model.id.in_(rows)
        return (await connection.execute(_update_nothing(model, limited))).rowcount
    counted = select(func.count()).select_from(rows.with_for_update().subquery())
    return (await connection.execute(counted)).scalar_one()


def _update_nothing(model: type[Entity], condition: ColumnElement[bool]) -> Any:
    return update(model).where(condition).values(version=model.version)


def type_of(values: Sequence[KeyValue]) -> ColumnType:
    """Return the SQL type of values of a unique column."""
    return BigInt if values and isinstance(values[0], int) else Text()
