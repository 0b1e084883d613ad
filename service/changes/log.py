"""ChangeLog: reads the log of changes, a page at a time.

One statement returns the next entries, the snapshot that it has of the database, and the identity of the
feed. A snapshot that was taken later would already see transactions whose entries this page does not have.
"""

import asyncio
import logging
import struct
from collections.abc import Collection, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import BigInteger, Integer, String, bindparam, column, text

from roster.errors import FeedReset, TokenExpired, Unsupported
from service.changes.reset import IDENTITY, reset_feed
from service.changes.support import NO_TRIGGERS, TRIGGERS, UNABLE, count_triggers_sql, lack_of
from service.changes.token import Token, snapshot_below
from service.db.compiled import CompiledSelect
from service.db.engine import Database
from service.db.errors import code_of
from service.db.selection import Row

log = logging.getLogger(__name__)

# A database that can't serve the feed is asked again after this time: a role may have been given a right.
UNSUPPORTED_SECONDS = 60
MAX_ENTRIES = 1000
MAX_WINDOW = 20_000  # entries of all tables, of which a page may want none
ID_BYTES = 8

# The entries of a window are those of the transactions that were open at its first snapshot, and of those
# that began later, as far as its last snapshot sees them. Each is a scan of the index on (xid, id). A single
# condition `xid >= xmin` would read all entries since an old open transaction, again and again.
#
# A window ends before `end_xid`, after the transaction of its entry number MAX_WINDOW. Otherwise a reader of
# one table would read the whole log of another one in one statement.
#
# A page must not take longer if the log is long, whatever the planner knows about it:
# - A scan has one lower bound. If there were also `xid >= ...`, PostgreSQL might begin at the smaller one:
#   each poll would read the whole index.
# - The bounds are comparisons of rows and not of equality: then only this index has the order of the page.
# - `coalesce` hides conditions from the planner. It would guess that few entries meet them, and read and sort
#   all entries of the window for each page.
# - `changes.xid` is the column. `ORDER BY xid` would be the result of the cast, which no index has.
READ = f"""
    SELECT
        pg_current_snapshot()::text AS snapshot,
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_xid,
        ends.end_xid::text::bigint AS end_xid,
        (SELECT xid::text::bigint FROM changes ORDER BY changes.xid DESC, id DESC LIMIT 1) AS newest_xid,
        feed.feed_id,
        feed.pruned_xid::text::bigint AS pruned_xid,
        ({", ".join(f"feed.{name}" for name in IDENTITY)})
            IS NOT DISTINCT FROM ({", ".join(IDENTITY.values())}) AS is_current,
        {count_triggers_sql(is_sqlite=False)} AS triggers,
        page.*
    FROM feed
    CROSS JOIN (
        SELECT
            nullif(:since, '')::pg_snapshot AS since,
            coalesce(nullif(:until, '')::pg_snapshot, pg_current_snapshot()) AS until,
            CAST(:xid AS xid8) AS xid,
            CAST(:xid AS xid8) >= pg_snapshot_xmax(nullif(:since, '')::pg_snapshot) AS is_later
    ) AS asked
    CROSS JOIN LATERAL (
        SELECT CASE WHEN :until <> '' THEN pg_snapshot_xmax(asked.until) ELSE least(
            pg_snapshot_xmax(asked.until),
            (
                SELECT (xid::text::bigint + 1)::text::xid8 FROM changes
                WHERE (xid, id) >= (pg_snapshot_xmax(asked.since), 0)
                ORDER BY changes.xid, id
                OFFSET {MAX_WINDOW} LIMIT 1
            )
        ) END AS end_xid
        OFFSET 0  -- computed once
    ) AS ends
    LEFT JOIN LATERAL (
        SELECT
            xid::text::bigint AS xid,
            id,
            entity,
            ids,
            (extract(epoch FROM changed_at) * 1000000)::bigint AS changed_at,
            total
        FROM (
            SELECT
                *,
                count(*) OVER () AS total,
                row_number() OVER ordered AS number,
                sum(octet_length(ids)) OVER ordered - octet_length(ids) AS bytes_before
            FROM (
                (
                    SELECT found.*
                    FROM pg_snapshot_xip(asked.since) AS open_xid
                    CROSS JOIN LATERAL (
                        SELECT * FROM changes
                        WHERE (xid, id) >= (open_xid, CASE WHEN open_xid = asked.xid THEN :id ELSE 0 END)
                            AND xid <= open_xid
                            AND coalesce(entity = ANY (string_to_array(:entities, ',')), false)
                        ORDER BY xid, id
                        LIMIT :max_entries + 1
                    ) AS found
                    WHERE open_xid >= asked.xid AND pg_visible_in_snapshot(open_xid, asked.until)
                    ORDER BY xid, id
                    LIMIT :max_entries + 1
                )
                UNION ALL
                (
                    SELECT * FROM changes
                    WHERE (xid, id) >= (
                            CASE WHEN asked.is_later THEN asked.xid ELSE pg_snapshot_xmax(asked.since) END,
                            CASE WHEN asked.is_later THEN :id ELSE 0 END
                        )
                        AND xid < ends.end_xid
                        AND coalesce(entity = ANY (string_to_array(:entities, ',')), false)
                        AND coalesce(pg_visible_in_snapshot(xid, asked.until), false)
                    ORDER BY xid, id
                    LIMIT :max_entries + 1
                )
            ) AS candidates
            WINDOW ordered AS (ORDER BY xid, id)
            ORDER BY xid, id
            LIMIT :max_entries + 1
        ) AS numbered
        WHERE number <= :max_entries AND bytes_before < :max_bytes
    ) AS page ON true
    ORDER BY page.xid, page.id
"""  # noqa: S608
READ_FROM_SQLITE = f"""
    SELECT
        last.seq AS snapshot,
        last.seq AS next_xid,
        coalesce(min(last.seq, :since + {MAX_WINDOW}), last.seq) AS end_xid,
        NULL AS newest_xid,
        feed.feed_id,
        feed.pruned_xid,
        true AS is_current,
        {count_triggers_sql(is_sqlite=True)} AS triggers,
        page.*
    FROM feed
    CROSS JOIN (
        SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'changes'), 0) AS seq
    ) AS last
    LEFT JOIN (
        SELECT *, count(*) OVER () AS total
        FROM (
            SELECT
                id AS xid,
                id,
                entity,
                ids,
                strftime('%s', substr(changed_at, 1, 19)) * 1000000 + substr(changed_at, 21) AS changed_at
            FROM changes
            WHERE id > :since AND id <= :since + {MAX_WINDOW}
                AND instr(',' || :entities || ',', ',' || entity || ',') > 0
            ORDER BY id
            LIMIT :max_entries + 1
        )
        ORDER BY id
    ) AS page ON true
    ORDER BY page.id
    LIMIT :max_entries
"""  # noqa: S608
COLUMNS = (
    *("snapshot", "next_xid", "end_xid", "newest_xid", "feed_id", "pruned_xid", "is_current", "triggers"),
    *("xid", "id", "entity", "ids", "changed_at", "total"),
)
TEXTS, NUMBERS = ("since", "until", "xid", "entities"), ("id", "max_entries", "max_bytes")


@dataclass(frozen=True)
class Entry:
    """Rows of one table that a transaction has changed; `offset` is the position of the first of its ids."""

    xid: int
    id: int
    table: str
    ids: Sequence[int]
    offset: int
    changed_at: int  # microseconds since 1970


@dataclass(frozen=True)
class LogPage:
    """The next entries of the log, and the token after them.

    `start` is the token before them, with the end of the window that they are in. Without `has_more`, the
    page ends with the snapshot of its own statement.
    """

    start: Token
    entries: Sequence[Entry]
    token: Token
    has_more: bool

    def token_at(self, entry: Entry, position: int) -> Token:
        """Return the token with which the next page begins at one of the ids of an entry."""
        if not self.start.is_in_window:  # SQLite's entries have one id each
            return replace(self.start, since=str(entry.id - 1))
        return replace(self.start, xid=entry.xid, id=entry.id, offset=entry.offset + position)


class ChangeLog:
    """Reads the log on the primary."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lack = ""  # why the database can't serve the feed
        self._lacks_until = 0.0
        self._resetting: asyncio.Task[None] | None = None
        sql = READ_FROM_SQLITE if database.is_sqlite else READ
        types: dict[str, Any] = dict.fromkeys(TEXTS, String()) | dict.fromkeys(NUMBERS, BigInteger())
        parameters: list[Any] = [
            bindparam(name, type_=kind) for name, kind in types.items() if f":{name}" in sql
        ]
        columns = [column(name, Integer()) for name in COLUMNS]
        self._query = CompiledSelect(
            text(sql).bindparams(*parameters).columns(*columns), database.engine.dialect
        )

    async def read(self, token: Token | None, tables: Collection[str], max_ids: int) -> LogPage:
        """Return the next entries of some tables after a token, with `max_ids` ids or little more.

        Without a token there are none: the page has the current position. Raises FeedReset, TokenExpired,
        Unsupported.
        """
        if token and token.is_snapshot == self._database.is_sqlite:
            raise _reset()
        rows = await self._current_rows(token, tables, max_ids)
        head = rows[0]
        if token is None:
            token = Token(head.feed_id, self._position(head))
            return LogPage(token, [], token, has_more=False)
        if token.feed_id != head.feed_id or token.next_xid > head.next_xid:
            raise _reset()
        if token.oldest_xid < head.pruned_xid:
            raise TokenExpired(
                "changes after this token are no longer in the log; export again, and continue with the "
                "watch_token of the export"
            )
        return self._page(token, rows)

    async def _current_rows(
        self, token: Token | None, tables: Collection[str], max_ids: int
    ) -> Sequence[Row]:
        """Return the rows of a page of the current feed; raises Unsupported."""
        if asyncio.get_running_loop().time() < self._lacks_until:
            raise Unsupported(self._lack)
        try:
            rows = await self._rows(token, tables, max_ids)
            if not rows or not rows[0].is_current:
                await self._reset()
                rows = await self._rows(token, tables, max_ids)
        except Exception as error:
            if not (code_of(error).startswith(UNABLE) and (lack := await lack_of(self._database))):
                raise
            raise self._unsupported(lack) from error
        if rows[0].triggers < TRIGGERS:
            # Tokens made before must not be valid once there are triggers again.
            await self._reset(is_forced=True)
            raise self._unsupported(NO_TRIGGERS)
        return rows

    def _unsupported(self, lack: str) -> Unsupported:
        """Return the error, and remember it for a while."""
        log.warning(lack)
        self._lack = lack
        self._lacks_until = asyncio.get_running_loop().time() + UNSUPPORTED_SECONDS
        return Unsupported(lack)

    async def _reset(self, *, is_forced: bool = False) -> None:
        """Begin another feed. To empty a long log takes time, so it goes on if this caller is cancelled."""
        if self._resetting is None or self._resetting.done():
            reset = reset_feed(self._database, is_forced=is_forced)
            self._resetting = asyncio.create_task(reset, context=Context())
            # If no caller is left to raise its error, the next read tries again.
            self._resetting.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._resetting)

    async def _rows(self, token: Token | None, tables: Collection[str], max_ids: int) -> Sequence[Row]:
        return await self._database.rows_of_log(
            self._query,
            since=token and token.since,
            until=token and token.until,
            xid=str(token.xid if token else 0),
            id=token.id if token else 0,
            entities=",".join(tables),
            max_entries=min(max_ids, MAX_ENTRIES),
            max_bytes=(max_ids + token.offset if token else 0) * ID_BYTES,
        )

    def _position(self, head: Row) -> str:
        """Return the position after all entries that the statement sees, or where its window ends.

        After a crash PostgreSQL gives some xids again: those of transactions that had not committed durably.
        So a position says nothing about xids above that of the newest entry. That one is durable, unless its
        session had set synchronous_commit = off.
        """
        if self._database.is_sqlite:
            return str(head.end_xid)
        durable = max(head.newest_xid or 0, head.pruned_xid - 1) + 1
        return snapshot_below(str(head.snapshot), min(durable, head.end_xid))

    def _page(self, token: Token, rows: Sequence[Row]) -> LogPage:
        is_sqlite = self._database.is_sqlite
        head, found = rows[0], [row for row in rows if row.id is not None]
        position = self._position(head)
        start = token if is_sqlite or token.is_in_window else replace(token, until=position)
        entries = [_entry(row, start) for row in found]
        if not found or found[-1].total <= len(found):
            end = replace(token, since=start.until or position, until="", xid=0, id=0, offset=0)
            # Others may have followed since the first page of the window.
            has_more = token.is_in_window or head.end_xid < head.next_xid
            return LogPage(start, entries, end, has_more)
        last = found[-1]
        if is_sqlite:
            return LogPage(start, entries, replace(token, since=str(last.id)), has_more=True)
        return LogPage(start, entries, replace(start, xid=last.xid, id=last.id + 1, offset=0), has_more=True)


def _reset() -> FeedReset:
    return FeedReset(
        "the feed of this token has ended: the database was restored, another server has become its primary, "
        "or the feed was reset, so changes may be missing; export again, and continue with the watch_token "
        "of the export"
    )


def _entry(row: Row, start: Token) -> Entry:
    ids = _unpack(row.ids)
    offset = start.offset if (row.xid, row.id) == (start.xid, start.id) else 0
    return Entry(row.xid, row.id, row.entity, ids[offset:], offset, row.changed_at)


def _unpack(ids: bytes | int) -> Sequence[int]:
    return [ids] if isinstance(ids, int) else struct.unpack(f">{len(ids) // ID_BYTES}q", ids)
