"""Deletes old entries of the log.

By xid, not by time: a token is valid if no entry is deleted that it has not seen, and a transaction may be
older than its commit by days. So all entries below one xid are deleted, and `feed.pruned_xid` is that xid.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, bindparam, text

from service.db.base import UtcDateTime
from service.db.engine import Database

BATCH_ENTRIES = 10_000

# The entries of a transaction have one time, so they are deleted together. Those of the transactions that are
# open now may still come: below their xids nothing may be pruned, or the tokens made now would be expired.
FIRST_KEPT = """
    SELECT least(
        coalesce(min(xid) FILTER (WHERE changed_at >= :before), max(xid) + 1),
        pg_snapshot_xmin(pg_current_snapshot())::text::bigint
    )
    FROM (
        SELECT xid::text::bigint AS xid, changed_at FROM changes ORDER BY changes.xid, id LIMIT :max_entries
    ) AS oldest
"""
FIRST_KEPT_OF_SQLITE = """
    SELECT coalesce(min(id) FILTER (WHERE changed_at >= :before), max(id) + 1)
    FROM (SELECT id, changed_at FROM changes ORDER BY id LIMIT :max_entries)
"""
# On an engine without ids of transactions the log is empty, and the other statements are not known.
LOCK = "SELECT 1 FROM feed WHERE EXISTS (SELECT 1 FROM changes) FOR UPDATE SKIP LOCKED"
DELETE = "DELETE FROM changes WHERE xid < CAST(CAST(:first_kept AS text) AS xid8)"
DELETE_FROM_SQLITE = "DELETE FROM changes WHERE id < :first_kept"
NOTE = "UPDATE feed SET pruned_xid = CAST(CAST(:first_kept AS text) AS xid8)"
NOTE_OF_SQLITE = "UPDATE feed SET pruned_xid = :first_kept"


async def prune_changes(database: Database, before: datetime) -> None:
    """Delete the entries of transactions that began before a time, unless another server is doing it."""
    while await _prune_batch(database, before):
        pass


async def _prune_batch(database: Database, before: datetime) -> bool:
    """Delete some of the entries, and return whether there may be others."""
    is_sqlite = database.is_sqlite
    async with database.begin() as session:
        if not is_sqlite and not await session.scalar(text(LOCK)):
            return False
        first_kept = await session.scalar(
            text(FIRST_KEPT_OF_SQLITE if is_sqlite else FIRST_KEPT).bindparams(
                bindparam("before", before, UtcDateTime), bindparam("max_entries", BATCH_ENTRIES, BigInteger)
            )
        )
        if first_kept is None:
            return False
        kept = bindparam("first_kept", first_kept, BigInteger)
        deleted: Any = await session.execute(
            text(DELETE_FROM_SQLITE if is_sqlite else DELETE).bindparams(kept)
        )
        if deleted.rowcount:
            await session.execute(text(NOTE_OF_SQLITE if is_sqlite else NOTE).bindparams(kept))
        return bool(deleted.rowcount)
