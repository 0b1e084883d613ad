"""Wrong feeds, each of which is easily taken for right. The histories must catch all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import bindparam, text

from roster.v1.changes_pb2 import Change, ListChangesRequest
from service.changes import log, prune
from service.changes.log import ChangeLog, LogPage
from service.changes.token import Token
from service.db.base import UtcDateTime
from service.db.engine import Database
from tests.faults.changes.followers import CALL_SECONDS, Follower, Stubs

# Positions are written as snapshots, `xmax:xmax:`, in which no transaction is open.
POSITION = "(SELECT format('%s:%s:', n, n) FROM (SELECT {}) AS newest (n))"
SNAPSHOT = "pg_current_snapshot()::text AS snapshot"
NEXT_XID = "pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_xid"
UNTIL = "pg_current_snapshot()) AS until"
NEWEST = "(SELECT xid::text::bigint FROM changes ORDER BY changes.xid DESC, id DESC LIMIT 1) AS newest_xid"
FIRST = """(xid, id) >= (
                            CASE WHEN asked.is_later THEN asked.xid ELSE pg_snapshot_xmax(asked.since) END,
                            CASE WHEN asked.is_later THEN :id ELSE 0 END
                        )"""
NEWEST_ID = "coalesce(max(id), 0) + 1 FROM changes"
NEWEST_XID = "coalesce(max(xid::text::bigint), 3) + 1 FROM changes"
OLDEST_OPEN = "pg_snapshot_xmin(pg_current_snapshot())"

# The posts that a delete of users saw when it began, without waiting for the transactions that write them.
NO_LOCK = """
    CREATE FUNCTION note_posts() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM set_config(
            'mutant.posts', coalesce((SELECT string_agg(id::text, ',') FROM posts), ''), true
        );
        RETURN NULL;
    END $$;
    CREATE TRIGGER note_posts BEFORE DELETE ON users FOR EACH STATEMENT EXECUTE FUNCTION note_posts();
    CREATE FUNCTION log_deleted_posts() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO changes (entity, ids)
        SELECT 'posts', string_agg(int8send(id), '') FROM changed
        WHERE EXISTS (SELECT 1 FROM users WHERE users.id = changed.author_id)
            OR id = ANY (string_to_array(current_setting('mutant.posts', true), ',')::bigint[])
        HAVING count(*) > 0;
        RETURN NULL;
    END $$;
    DROP TRIGGER log_delete ON posts;
    CREATE TRIGGER log_delete AFTER DELETE ON posts REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION log_deleted_posts()
"""
OLD = text(
    "WITH old AS (DELETE FROM changes WHERE changed_at < :before RETURNING 1) SELECT count(*) FROM old"
).bindparams(bindparam("before", type_=UtcDateTime))
# New tokens stay valid.
NOTE = text("""
    UPDATE feed
    SET pruned_xid = least(kept.xid, pg_snapshot_xmin(pg_current_snapshot())::text::bigint)::text::xid8
    FROM (SELECT min(xid::text::bigint) FROM changes) AS kept (xid)
    WHERE kept.xid IS NOT NULL
""")

Patch = pytest.MonkeyPatch


def cursor_by_id(patch: Patch) -> None:
    """Entries with an id above the last one."""
    by_id = _with_position(NEWEST_ID)
    for old, new in {
        FIRST: "id >= greatest(:id, pg_snapshot_xmax(asked.since)::text::bigint)",
        "xid < ends.end_xid": "id < pg_snapshot_xmax(asked.until)::text::bigint",
        "AND coalesce(pg_visible_in_snapshot(xid, asked.until), false)": "",
        "ORDER BY xid, id": "ORDER BY id",
        "ORDER BY page.xid, page.id": "ORDER BY page.id",
        "xid::text::bigint AS xid,": "id AS xid,",
    }.items():
        assert old in by_id, old
        by_id = by_id.replace(old, new)
    patch.setattr(log, "READ", by_id)


def cursor_by_xid(patch: Patch) -> None:
    """Entries with an xid above the last one."""
    patch.setattr(log, "READ", _with_position(NEWEST_XID))


def horizon(patch: Patch) -> None:
    """Only entries below the oldest open transaction: nothing is lost, but all wait for that one."""
    patch.setattr(log, "READ", _with_position(OLDEST_OPEN))


def token_of_a_later_statement(patch: Patch) -> None:
    """The snapshot is taken after the entries have been read."""
    read_rows = ChangeLog._rows

    async def rows(self: ChangeLog, *arguments: Any) -> Sequence[Any]:
        found = await read_rows(self, *arguments)
        later = (await read_rows(self, None, (), 1))[0]
        return [_WithSnapshot(row, later.snapshot) for row in found]

    patch.setattr(ChangeLog, "_rows", rows)


def export_token_after_the_first_row(patch: Patch) -> None:
    """Changes of the first rows, between their read and the token, are in neither."""

    async def token_after(
        stubs: Stubs, entities: Sequence[Change.Entity.ValueType], export: Callable[[], Any]
    ) -> str:
        await export()
        request = ListChangesRequest(entities=entities)
        return str((await stubs.changes.ListChanges(request, timeout=CALL_SECONDS)).token)

    patch.setattr(Follower, "export_with_token", staticmethod(token_after))


def old_window_for_the_newest(patch: Patch) -> None:
    """The end of a window that began in an earlier page is taken for the newest position."""
    make_page = ChangeLog._page

    def page(self: ChangeLog, token: Token, rows: Sequence[Any]) -> LogPage:
        made = make_page(self, token, rows)
        return made if made.token.is_in_window else replace(made, has_more=False)

    patch.setattr(ChangeLog, "_page", page)


def prune_by_time(patch: Patch) -> None:
    """A transaction that began early has old entries, although it has just committed them."""

    async def prune_old(database: Database, before: datetime) -> bool:
        async with database.begin() as session:
            await session.scalar(OLD, {"before": before})
            await session.execute(NOTE)
        return False

    patch.setattr(prune, "_prune_batch", prune_old)


class _WithSnapshot:
    """A row with another snapshot."""

    def __init__(self, row: Any, snapshot: str) -> None:
        self._row = row
        self.snapshot = snapshot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._row, name)


# By name: how the code is changed, and SQL for the database.
MUTANTS: dict[str, tuple[Callable[[Patch], None] | None, str]] = {
    "a cursor by id": (cursor_by_id, ""),
    "a cursor by xid": (cursor_by_xid, ""),
    "an old window for the newest": (old_window_for_the_newest, ""),
    "a token of a later statement": (token_of_a_later_statement, ""),
    "a cascade without the lock": (None, NO_LOCK),
    "an export token after the first row": (export_token_after_the_first_row, ""),
    "pruning by time": (prune_by_time, ""),
    "a horizon": (horizon, ""),
}


@contextmanager
def mutant(name: str) -> Iterator[str]:
    """Change the code until the block ends, and yield the SQL to execute in each database."""
    change, sql = MUTANTS[name]
    with pytest.MonkeyPatch.context() as patch:
        if change:
            change(patch)
        yield sql


def _with_position(newest: str) -> str:
    """Return the statement with another position than the snapshot."""
    position = POSITION.format(newest)
    until = f"{position}::pg_snapshot) AS until"
    changes = {SNAPSHOT: f"{position} AS snapshot", UNTIL: until, NEWEST: f"{1 << 60} AS newest_xid"}
    changes[NEXT_XID] = f"split_part({position}, ':', 1)::bigint AS next_xid"
    read = log.READ
    for old, new in changes.items():
        assert old in read
        read = read.replace(old, new)
    return read
