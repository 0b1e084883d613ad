"""The stored answers to writes with a `request_id`, and their erasure when the row in them is deleted."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Index,
    LargeBinary,
    Select,
    SmallInteger,
    Table,
    UniqueConstraint,
    cast,
    func,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, BigInt, Column, Entity, Query, UtcDateTime, now, text
from service.db.dialect import is_one_of
from service.db.distribution import ONE_CONNECTION, is_distributed
from service.db.locks import lock_where

NO_FINGERPRINT = b""


class Request(Base):
    """A successful write with a `request_id`: its caller, its method, its fingerprint and its answer.

    Without an answer it is erased: the row in the answer has been deleted.
    """

    __tablename__ = "requests"
    __table_args__ = (Index(None, "created_at"), Index(None, "entity_id", "entity"))

    caller: Mapped[str] = mapped_column(text(255), primary_key=True)
    method: Mapped[str] = mapped_column(text(255), primary_key=True)
    request_id: Mapped[UUID] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    # The table and the id of the row in the answer; null if there is none, as after a delete.
    entity: Mapped[str | None] = mapped_column(text(63))
    entity_id: Mapped[int | None] = mapped_column(BigInt)
    # What was done, as a Result of `service/db/bulk/batch.py`; null in rows of earlier releases.
    outcome: Mapped[int | None] = mapped_column(SmallInteger)


async def erase_answers(session: AsyncSession, entity: str, ids: Sequence[int] | Query) -> None:
    """Erase the answers that contain a row of the table `entity` with one of the ids, or of those of a query.

    The caller has locked or deleted these rows in an earlier statement. Then every write of them has been
    committed, and this statement sees its answer; later writes don't find the row.
    """
    has_id = _is_any_of(session, Request.entity_id, ids)
    # Not the comparison alone: without statistics, PostgreSQL expects few rows to meet it, so it reads all
    # rows of the entity and compares each with all ids: over 30 s for 5,000 ids and 100,000 answers.
    is_of_entity = func.coalesce(Request.entity == entity, False)
    about = (is_of_entity, has_id, Request.answer.is_not(None))
    # A digest of the request could be compared with those of guesses.
    erased = update(Request).where(*about).values(answer=None, fingerprint=NO_FINGERPRINT)
    await session.execute(erased, execution_options={"synchronize_session": False})


async def erase_answers_about(session: AsyncSession, model: type[Entity], ids: Sequence[int] | Query) -> None:
    """Erase the answers about locked rows, and about all rows that are deleted with them.

    The number of statements and the memory do not depend on the number of rows.
    """
    await erase_answers(session, model.__tablename__, ids)
    for child, column in cascading_columns(model):
        refers = _is_any_of(session, column, ids)
        # In a statement of its own: the next ones see what was committed while it waited for locks.
        if await lock_where(session, child, refers):
            await erase_answers_about(session, child, select(child.id).where(refers))


async def prepare_cascade(session: AsyncSession, model: type[Entity]) -> None:
    """Begin a transaction that deletes rows of a model, and with them rows of other tables."""
    if _cascades_to_other_servers(session, model):
        await session.execute(ONE_CONNECTION)


async def exclude_references(session: AsyncSession, model: type[Entity], ids: Sequence[int]) -> None:
    """Wait for writes of rows that refer to locked rows, which will be deleted, and let no more begin.

    On PostgreSQL, the locks have done so. Citus takes them only on the coordinator, but other servers check
    what new rows refer to. There, a new unique value has the same effect: its lock is on each server.
    """
    table = model.__table__
    if _cascades_to_other_servers(session, model) and isinstance(table, Table):
        unique = (each for each in table.constraints if isinstance(each, UniqueConstraint))
        values = {column.key: cast(-model.id, column.type) for each in unique for column in each.columns}
        changed = update(model).where(is_one_of(session, model.id, ids)).values(values)
        await session.execute(changed, execution_options={"synchronize_session": False})


def _cascades_to_other_servers(session: AsyncSession, model: type[Entity]) -> bool:
    return any(is_distributed(session, child) for child, _ in cascading_columns(model))


def cascading_columns(model: type[Entity]) -> list[tuple[type[Entity], Column]]:
    """Return the entities whose rows are deleted with those of a model, each with the column that refers."""
    return [
        (mapper.class_, getattr(mapper.class_, mapper.get_property_by_column(column).key))
        for mapper in model.registry.mappers
        if issubclass(mapper.class_, Entity)
        for column in mapper.columns
        for key in column.foreign_keys
        if key.column.table is model.__table__ and key.ondelete == "CASCADE"
    ]


def _is_any_of(session: AsyncSession, column: Column, ids: Sequence[int] | Query) -> ColumnElement[bool]:
    return column.in_(ids) if isinstance(ids, Select) else is_one_of(session, column, ids)
