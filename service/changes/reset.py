"""The end of a feed and the beginning of the next one: no token of the first is valid in the second.

The log continues only on the database that wrote it. After a restore, changes that tokens stand for may have
never happened; after a promotion, the last ones may be lost. Neither shows in the log.
"""

from secrets import token_hex
from typing import Any, cast

from sqlalchemy import delete, insert, literal_column, select, text, update
from sqlalchemy.engine import CursorResult

from service.changes.model import FeedRow, LogEntry
from service.db.base import Session
from service.db.engine import Database
from service.db.position import CLUSTER, PRIMARY_TIMELINE

FEED_ID_BYTES = 16
BATCH_ENTRIES = 50_000
# The columns by which the next read knows this database.
DATABASE = "(SELECT oid::bigint FROM pg_database WHERE datname = current_database())"
IDENTITY = {
    "system_identifier": CLUSTER,
    "timeline": PRIMARY_TIMELINE,
    "database_oid": DATABASE,
    "table_oid": "feed.tableoid::bigint",
}


async def reset_feed(database: Database, *, is_forced: bool = False) -> None:
    """Begin another feed if the database is not the one that wrote the log, or if it is forced."""
    async with database.begin() as session:
        is_current = await _lock_feed(session, is_sqlite=database.is_sqlite)
        if is_current and not is_forced:  # another server has been faster
            return
        while await _delete_batch(session) == BATCH_ENTRIES:
            pass
        identity = {} if database.is_sqlite else {name: text(sql) for name, sql in IDENTITY.items()}
        await session.execute(
            update(FeedRow).values(feed_id=token_hex(FEED_ID_BYTES), pruned_xid=text("'0'"), **identity)
        )


async def _lock_feed(session: Session, *, is_sqlite: bool) -> bool:
    """Lock the row of the feed, and return whether it is that of this database; add one if it is missing."""
    columns = [FeedRow.feed_id] if is_sqlite else [getattr(FeedRow, name) for name in IDENTITY]
    found: list[Any] = columns if is_sqlite else [literal_column(sql) for sql in IDENTITY.values()]
    query = select(*columns, *found).with_for_update(of=FeedRow)
    row = (await session.execute(query)).one_or_none()
    if row is None and not is_sqlite:  # SQLite has one writer; here another server may be adding the row
        await session.execute(text("LOCK TABLE feed IN SHARE ROW EXCLUSIVE MODE"))
        row = (await session.execute(query)).one_or_none()
    if row is None:
        await session.execute(insert(FeedRow).values(feed_id=token_hex(FEED_ID_BYTES)))
        return False
    return row[: len(columns)] == row[len(columns) :]


async def _delete_batch(session: Session) -> int:
    oldest = select(LogEntry.id).order_by(LogEntry.id).limit(BATCH_ENTRIES)
    deleted = await session.execute(delete(LogEntry).where(LogEntry.id.in_(oldest)))
    return cast("CursorResult[Any]", deleted).rowcount
