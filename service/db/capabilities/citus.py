"""The state of a Citus cluster: whether Roster's tables are distributed, and what Roster needs of the nodes.

Reading and judging are apart, so that each judgement can be tested without a cluster.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from service.db.capabilities.scratch import close, open_connection

VERSION = "SELECT extversion FROM pg_extension WHERE extname = 'citus'"
TESTED_VERSIONS = ("13.",)
DISTRIBUTED, REFERENCE, LOCAL = "distributed", "reference", "local"
# What deploy/sql/citus.sql makes of each table. Citus knows all of them; of others it need not know.
LAYOUT = {
    "users": REFERENCE,
    "posts": DISTRIBUTED,
    "requests": LOCAL,
    "bulk_batches": LOCAL,
}
LOST = (
    "without on Citus: the change feed and the watch_token of exports;\n"
    "one moment at which an export or a list of posts sees all nodes"
)
RUN = "run deploy/sql/citus.sql"

TABLES = f"""
    SELECT relname, CASE WHEN partmethod <> 'n' THEN '{DISTRIBUTED}' WHEN repmodel = 't' THEN '{REFERENCE}'
        ELSE '{LOCAL}' END
    FROM pg_dist_partition JOIN pg_class ON pg_class.oid = logicalrelid
    WHERE pg_table_is_visible(logicalrelid)
"""  # noqa: S608  (constants)
SHARDS = "SELECT count(*) FROM pg_dist_shard WHERE logicalrelid = to_regclass('posts')"
LOCAL_GROUP = "SELECT groupid FROM pg_dist_local_group"
NODES = "SELECT nodename, nodeport, groupid, isactive, shouldhaveshards FROM pg_dist_node ORDER BY groupid"
PREPARED = """
    SELECT nodename || ':' || nodeport, success, result
    FROM run_command_on_all_nodes('SHOW max_prepared_transactions') JOIN pg_dist_node USING (nodeid)
    ORDER BY groupid
"""
HAS_TABLES = "SELECT to_regclass('roster_schema') IS NOT NULL AND to_regclass('posts') IS NOT NULL"


@dataclass(frozen=True)
class Cluster:
    """The catalog of Citus; `prepared` is the setting max_prepared_transactions of each node, or an error."""

    tables: Mapping[str, str] = field(default_factory=dict)
    has_tables: bool = True  # whether Roster's exist
    knows_coordinator: bool = True
    is_worker: bool = False
    workers: int = 0  # that may have shards
    inactive: tuple[str, ...] = ()
    shards: int = 0
    prepared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A sentence, and the method of the report that prints it."""

    level: Literal["ok", "warn", "fail"]
    text: str


async def read_cluster(url: str) -> Cluster:
    """Return the state of the cluster of a database with the extension; raises the errors of the driver."""
    driver = await open_connection(url)
    try:
        nodes = await driver.fetch(NODES)
        return Cluster(
            tables=dict(map(tuple, await driver.fetch(TABLES))),
            has_tables=await driver.fetchval(HAS_TABLES),
            knows_coordinator=any(node["groupid"] == 0 for node in nodes),
            is_worker=await driver.fetchval(LOCAL_GROUP) != 0,
            workers=sum(node["shouldhaveshards"] for node in nodes if node["groupid"] > 0),
            inactive=tuple(
                f"{node['nodename']}:{node['nodeport']}" for node in nodes if not node["isactive"]
            ),
            shards=await driver.fetchval(SHARDS),
            prepared=await _prepared(driver) if nodes else {},
        )
    finally:
        await close(driver)


async def _prepared(driver: Any) -> Mapping[str, str]:
    return {node: str(result) for node, _, result in await driver.fetch(PREPARED)}


def judge(cluster: Cluster) -> Iterator[Finding]:
    """Yield the findings about a cluster."""
    if cluster.is_worker:
        yield Finding("fail", "this is a worker of Citus; set ROSTER_DATABASE_URL to the coordinator")
        return
    yield from _layout(cluster)
    yield from _nodes(cluster)
    yield Finding("warn", LOST)


def _layout(cluster: Cluster) -> Iterator[Finding]:
    found = {name: cluster.tables[name] for name in LAYOUT if name in cluster.tables}
    if not cluster.has_tables:
        yield Finding("warn", f"Citus has none of Roster's tables; run `roster migrate`, then {RUN[4:]}")
    elif not found:
        yield Finding("warn", f"Roster's tables are not distributed; {RUN}")
    elif found == LAYOUT:
        yield Finding(
            "ok",
            f"posts has {cluster.shards} shards on {_count(cluster.workers, 'worker')}; "
            "users is on every node",
        )
    else:
        wrong = [
            f"{name} is {found.get(name, 'unknown to it')} instead of {kind}"
            for name, kind in LAYOUT.items()
            if found.get(name) != kind
        ]
        yield Finding(
            "fail",
            f"Citus has not all tables as Roster needs them: {', '.join(wrong)}; {RUN}\n"
            "needed for writes that are applied exactly once",
        )


def _nodes(cluster: Cluster) -> Iterator[Finding]:
    if not cluster.knows_coordinator:
        yield Finding(
            "fail",
            "the coordinator is not in pg_dist_node; run SELECT citus_set_coordinator_host('name', port)",
        )
    if not cluster.workers:
        yield Finding("fail", "no worker may have shards; run SELECT citus_add_node('name', port) for each")
    for node in cluster.inactive:
        yield Finding("fail", f"the node {node} is not active; run SELECT citus_activate_node('name', port)")
    yield from _two_phase_commit(cluster.prepared)


def _two_phase_commit(prepared: Mapping[str, str]) -> Iterator[Finding]:
    unusable = {node: value for node, value in prepared.items() if not value.isdecimal()}
    for node, problem in unusable.items():
        yield Finding(
            "fail",
            f"the coordinator can't use the node {node} with this role: {problem}\n"
            "needed for posts, and for writes of users",
        )
    without = [node for node, value in prepared.items() if value == "0"]
    for node in without:
        yield Finding(
            "fail",
            f"the node {node}: max_prepared_transactions is 0; set it to at least max_connections\n"
            "needed for two-phase commit",
        )
    if prepared and not unusable and not without:
        yield Finding("ok", f"two-phase commit on {_count(len(prepared), 'node')}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
