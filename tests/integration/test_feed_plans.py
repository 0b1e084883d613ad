"""PostgreSQL finds a page of the change feed by its index, however long the log is."""

import json
from typing import Any

import pytest

from service.changes.log import MAX_WINDOW, ChangeLog
from service.db.engine import Database
from service.settings import Settings
from tests.support.rival import rival

TRANSACTIONS, ENTRIES = 200, 50  # of each
PAGE, WINDOW = 10, 100
BLOCKS = 10  # of the index and the table; the index has 40
# Committed one by one, and never analysed: the planner has to guess.
FILL = f"""
    DO $$ BEGIN
        FOR number IN 1..{TRANSACTIONS} LOOP
            INSERT INTO changes (entity, ids)
            SELECT 'posts', int8send(id) FROM generate_series(1, {ENTRIES}) AS id;
            COMMIT;
        END LOOP;
    END $$
"""
XIDS = (
    "SELECT array_agg(xid ORDER BY xid) FROM (SELECT DISTINCT xid::text::bigint AS xid FROM changes) AS found"
)


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes of a plan."""
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_page_does_not_depend_on_the_length_of_the_log(postgresql_url: str, mode: str) -> None:
    """At the head, far from it, after an open transaction, and within windows."""
    query = ChangeLog(Database(Settings(database_url=postgresql_url)))._query
    sql = query.sql.replace(f"OFFSET {MAX_WINDOW}", f"OFFSET {WINDOW}")
    names = [parameter.key for parameter in query._parameters]
    async with rival(postgresql_url) as session:
        await session.rollback()
        connection: Any = session.connection
        await connection.execute(
            f"ALTER TABLE changes SET (autovacuum_enabled = off); SET plan_cache_mode = {mode}"
        )
        await connection.execute(FILL)
        await connection.execute(f"PREPARE page AS {sql}")
        xids = await connection.fetchval(XIDS)
        first, middle, last = xids[0], xids[len(xids) // 2], xids[-1]
        end, begin = f"{last + 1}:{last + 1}:", f"{first}:{first}:"
        positions: dict[str, dict[str, Any]] = {
            "no token": {"since": "", "entities": ""},
            "head": {"since": end},
            "far from the head": {"since": begin},
            "far from the head, with nothing to send": {"since": begin, "entities": "users"},
            "an open transaction": {"since": f"{middle}:{last + 1}:{middle}"},
            "middle of a window": {"since": begin, "until": end, "xid": str(middle), "id": 1},
            "middle of an open one": {
                "since": f"{middle}:{last}:{middle}",
                "until": end,
                "xid": str(middle),
                "id": 1,
            },
        }
        for name, position in positions.items():
            values = {"until": "", "xid": "0", "id": 0, "entities": "users,posts", **position}
            values |= {"max_entries": PAGE, "max_bytes": 8 * PAGE}
            literals = ", ".join(f"'{values[key]}'" for key in names)
            explain = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE page ({literals})"
            [found] = json.loads(await connection.fetchval(explain))
            scans = [node for node in nodes(found["Plan"]) if node.get("Relation Name") == "changes"]
            assert len(scans) >= 3, name
            for scan in scans:
                assert scan.get("Index Name") == "ix_changes_xid_id", name
                assert scan["Node Type"] in ("Index Scan", "Index Only Scan"), name
                assert scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) <= WINDOW + ENTRIES, name
                assert scan["Shared Hit Blocks"] + scan["Shared Read Blocks"] <= BLOCKS, name
