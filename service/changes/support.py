"""Requirements of the feed on a database, and sentences about those that are not met."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text

from service.changes.kinds import KINDS
from service.db.engine import Database
from service.db.errors import code_of
from service.db.position import CLUSTER, PRIMARY_TIMELINE

NOT_AVAILABLE = "the change feed is not available, because"
NO_RIGHT = "42501"
# Not supported; unknown, or no right.
UNABLE = ("0A", "42")
EVENTS = ("insert", "update", "delete")
NO_TRIGGERS = (
    f"{NOT_AVAILABLE} the triggers that log changes are missing or disabled; enable them, or run `roster "
    "migrate`, which creates those that are missing; on Citus there can be none"
)


@dataclass(frozen=True)
class Need:
    """A statement that needs something of PostgreSQL, and the name of that."""

    name: str
    statement: str


NEEDS: Sequence[Need] = (
    Need("xid8 and pg_current_snapshot()", "SELECT pg_current_snapshot()::text, '1'::xid8::text"),
    Need("pg_control_system()", f"SELECT {CLUSTER}"),
    Need("pg_walfile_name() and pg_current_wal_insert_lsn()", f"SELECT {PRIMARY_TIMELINE}"),
    Need("the tables changes and feed", "SELECT 1 FROM changes CROSS JOIN feed LIMIT 1"),
    # EXPLAIN needs the rights of the statement, and does not execute it.
    Need("UPDATE of the table feed", "EXPLAIN UPDATE feed SET feed_id = feed_id"),
    Need("DELETE from the table changes", "EXPLAIN DELETE FROM changes"),
)


def trigger_names(table: str, *, is_sqlite: bool) -> list[str]:
    """Return the names of the triggers that log the changes of a table."""
    return [f"log_{event}_of_{table}" if is_sqlite else f"log_{event}" for event in EVENTS]


def count_triggers_sql(*, is_sqlite: bool) -> str:
    """Return the expression that counts the triggers that log changes."""
    names = {name for kind in KINDS for name in trigger_names(kind.table, is_sqlite=is_sqlite)}
    listed = ", ".join(f"'{name}'" for name in sorted(names))
    if is_sqlite:
        return f"(SELECT count(*) FROM sqlite_schema WHERE type = 'trigger' AND name IN ({listed}))"  # noqa: S608
    tables = ", ".join(f"to_regclass('{kind.table}')" for kind in KINDS)
    return (
        f"(SELECT count(*) FROM pg_trigger WHERE tgrelid IN ({tables}) AND tgname IN ({listed}) "  # noqa: S608
        "AND tgenabled IN ('O', 'A'))"
    )


TRIGGERS = len(KINDS) * len(EVENTS)


async def lack_of(database: Database) -> str:
    """Return a sentence about the first need that this database does not meet, "" if it meets all."""
    for need in NEEDS:
        try:
            async with database.read() as session:
                await session.execute(text(need.statement))
        except Exception as error:
            code = code_of(error)
            if not code.startswith(UNABLE):
                raise
            if code == NO_RIGHT:
                return f"{NOT_AVAILABLE} the role of the service may not use {need.name}; grant it that"
            return f"{NOT_AVAILABLE} the database has no {need.name}"
    return ""
