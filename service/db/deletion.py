"""Deletion of rows together with those that refer to them.

The steps are statements of their own: lock the rows, delete those that refer to them, delete the rows. A row
that refers to one is inserted under a lock on it, so after the first step no others are. A single statement
with CTEs would read all tables as they were when it began. It would miss a row that was committed while it
waited for a lock; the foreign key would then delete it unseen.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, exists, func, select

from roster.errors import TooLarge
from service.db.answers import erase_answers_about
from service.db.base import BigInt, Column, Entity, ReadSession, Session, model_of
from service.db.dialect import is_one_of, values_table
from service.db.distribution import is_distributed
from service.db.locks import lock_where

MAX_DEPENDENTS = 100_000  # of the rows of one batch


async def ids_with_dependents(session: Session, reference: Column, ids: Sequence[int]) -> set[int]:
    """Return those of the ids to which rows refer, however many."""
    if is_distributed(session, model_of(reference)):
        return set(await count_referring(session, reference, ids))
    listed = values_table(session, ids, BigInt)
    referred = select(listed.c.value).where(exists().where(reference == listed.c.value))
    connection = await session.connection()
    return set((await connection.execute(referred)).scalars())


async def count_dependents(session: Session, reference: Column, ids: Sequence[int]) -> Counter[int]:
    """Return how many rows refer to each of the ids; raises TooLarge."""
    counts = await count_referring(session, reference, ids)
    if counts.total() > MAX_DEPENDENTS:
        raise _too_large(reference, counts.total())
    return counts


async def count_referring(session: ReadSession, reference: Column, ids: Sequence[int]) -> Counter[int]:
    """Return how many rows refer to each of the ids, however many."""
    counted = select(reference, func.count()).where(is_one_of(session, reference, ids)).group_by(reference)
    connection = await session.connection()
    rows: Sequence[Any] = (await connection.execute(counted)).all()
    return Counter(dict(rows))


async def delete_dependents(session: Session, reference: Column, ids: Sequence[int]) -> Counter[int]:
    """Delete the rows that refer to the ids, whose rows are locked; return how many there were of each.

    The answers about them are erased. Raises TooLarge, and then deletes none.
    """
    # Lock them in id order, like all writers of several rows. The rows stay in the database: 100,000 of them
    # would block the event loop.
    model = model_of(reference)
    refers = is_one_of(session, reference, ids)
    if not await lock_where(session, model, refers, MAX_DEPENDENTS + 1):
        return Counter()
    counts = await count_dependents(session, reference, ids)
    await erase_answers_about(session, model, select(model.id).where(refers))
    connection = await session.connection()
    await connection.execute(delete(model).where(refers))
    return counts


async def delete_rows(session: Session, model: type[Entity], ids: Sequence[int]) -> None:
    """Delete rows that are locked, after the answers about them have been erased."""
    connection = await session.connection()
    await connection.execute(delete(model).where(is_one_of(session, model.id, ids)))


def _too_large(reference: Column, count: int) -> TooLarge:
    table = reference.class_.__tablename__
    return TooLarge(
        f"the rows of this message have {count:,} {table} together, and at most {MAX_DEPENDENTS:,} are "
        f"deleted at once; send fewer rows in a message, or delete the {table} first",
        count=count,
    )
