"""`roster doctor --database` on Citus, and the tables of deploy/sql/citus.sql, without a cluster."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import service.changes.model
import service.db.answers
import service.db.servers
import service.db.token_keys
import service.loads.model
import service.posts.model
import service.users.model  # noqa: F401  (importing a module registers its tables)
from service.db.base import Base
from service.db.capabilities.citus import DISTRIBUTED, LAYOUT, LOCAL, LOST, REFERENCE, Cluster, Finding, judge
from service.db.schema import COMPATIBILITY, OLD_VERSION_TABLE, VERSION_TABLE

DISTRIBUTE = (Path(__file__).parents[2] / "deploy/sql/citus.sql").read_text()
PREPARED = {"a:5432": "200", "b:5432": "200", "c:5432": "200"}
CLUSTER = Cluster(tables=LAYOUT, workers=2, shards=32, prepared=PREPARED)
SHARDS = Finding("ok", "posts has 32 shards on 2 workers; users is on every node")
TWO_PHASES = Finding("ok", "two-phase commit on 3 nodes")
EXACTLY_ONCE = "\nneeded for writes that are applied exactly once"
NOT_ALL = "Citus has not all tables as Roster needs them"

# By what is wrong, the cluster, and what is reported in the place of the shards and of two-phase commit.
PROBLEMS: dict[str, tuple[Cluster, list[Finding]]] = {
    "not distributed": (
        replace(CLUSTER, tables={}),
        [Finding("warn", "Roster's tables are not distributed; run deploy/sql/citus.sql"), TWO_PHASES],
    ),
    "not migrated": (
        replace(CLUSTER, tables={}, has_tables=False),
        [
            Finding(
                "warn", "Citus has none of Roster's tables; run `roster migrate`, then deploy/sql/citus.sql"
            ),
            TWO_PHASES,
        ],
    ),
    "a local table that Citus does not know": (
        replace(CLUSTER, tables={name: kind for name, kind in LAYOUT.items() if name != "requests"}),
        [
            Finding(
                "fail",
                f"{NOT_ALL}: requests is unknown to it instead of local; run deploy/sql/citus.sql"
                f"{EXACTLY_ONCE}",
            ),
            TWO_PHASES,
        ],
    ),
    "posts on one node": (
        replace(CLUSTER, tables=LAYOUT | {"posts": LOCAL}),
        [
            Finding(
                "fail",
                f"{NOT_ALL}: posts is local instead of distributed; run deploy/sql/citus.sql{EXACTLY_ONCE}",
            ),
            TWO_PHASES,
        ],
    ),
    "coordinator": (
        replace(CLUSTER, knows_coordinator=False),
        [
            SHARDS,
            Finding(
                "fail",
                "the coordinator is not in pg_dist_node; run SELECT citus_set_coordinator_host('name', port)",
            ),
            TWO_PHASES,
        ],
    ),
    "no worker": (
        replace(CLUSTER, workers=0, tables={}, prepared={}),
        [
            Finding("warn", "Roster's tables are not distributed; run deploy/sql/citus.sql"),
            Finding("fail", "no worker may have shards; run SELECT citus_add_node('name', port) for each"),
        ],
    ),
    "an inactive node": (
        replace(CLUSTER, inactive=("c:5432",)),
        [
            SHARDS,
            Finding("fail", "the node c:5432 is not active; run SELECT citus_activate_node('name', port)"),
            TWO_PHASES,
        ],
    ),
    "two-phase commit": (
        replace(CLUSTER, prepared=PREPARED | {"b:5432": "0", "c:5432": "connection refused"}),
        [
            SHARDS,
            Finding(
                "fail",
                "the coordinator can't use the node c:5432 with this role: connection refused\n"
                "needed for posts, and for writes of users",
            ),
            Finding(
                "fail",
                "the node b:5432: max_prepared_transactions is 0; set it to at least max_connections\n"
                "needed for two-phase commit",
            ),
        ],
    ),
}


def test_reports_a_complete_cluster() -> None:
    """It names what is lost all the same."""
    assert list(judge(CLUSTER)) == [SHARDS, TWO_PHASES, Finding("warn", LOST)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_reports_each_problem(problem: str) -> None:
    """The other findings are the same."""
    cluster, findings = PROBLEMS[problem]
    assert list(judge(cluster)) == [*findings, Finding("warn", LOST)]


def test_reports_nothing_else_of_a_worker() -> None:
    """It does not have the tables of the coordinator."""
    [finding] = judge(replace(CLUSTER, is_worker=True))
    assert finding.level == "fail"
    assert "set ROSTER_DATABASE_URL to the coordinator" in finding.text


def test_script_decides_on_every_table() -> None:
    """A new one must be added to the script: as what, and why."""
    [undistributed] = re.findall(r"not write a table above: (.*?)\.\n", DISTRIBUTE, re.DOTALL)
    [local] = re.findall(r"IN ARRAY ARRAY\['requests'(.*?)\] LOOP", DISTRIBUTE)
    by_script = {
        **dict.fromkeys(re.findall(r"create_reference_table\('(\w+)'\)", DISTRIBUTE), REFERENCE),
        **dict.fromkeys(re.findall(r"create_distributed_table\('(\w+)', 'id'", DISTRIBUTE), DISTRIBUTED),
        **dict.fromkeys(["requests", *re.findall(r"'(\w+)'", local)], LOCAL),
    }
    others = set(re.findall(r"\w+", undistributed.replace("--", "")))

    assert by_script == LAYOUT
    assert by_script.keys() | others == Base.metadata.tables.keys() | {
        VERSION_TABLE,
        OLD_VERSION_TABLE,
        COMPATIBILITY.name,
    }
    assert not by_script.keys() & others
