"""Measures reads, writes and bulk streams without Citus, on one node and on three, and explains the reads.

    ROSTER_TEST_CITUS_URL=postgresql://… make bench-citus

The rows are the same in each of three databases, which take turns. If all nodes are on one machine, they share
its cores: the figures show what distribution costs, not what more machines give.
"""

import argparse
import asyncio
import json
import os
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import asyncpg
import grpc
from sqlalchemy import make_url

from bench.citus_calls import Call, Rows, Stream, path
from bench.databases import execute, plain_url
from bench.measure import Clock, Run, Thing, ask, expect, start_process, take_turns
from bench.report import Table, heading, machine, save, three_digits
from bench.servers import ROSTER, Started, start_server
from roster.v1.posts_pb2 import ListPostsRequest, ListPostsResponse
from service.db import migrations
from tests.support.citus import CitusCluster, distribute
from tests.support.postgres import Postgres
from tests.support.server import serve
from tests.support.statements import Statement, record_statements

PLAIN, ONE, THREE = "plain", "one node", "three nodes"
LEAST = 5  # calls of a run, however long they take
DEPTH = 1000
LOCAL = {"127.0.0.1", "localhost", "::1"}
POSTMASTER = "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int"
VERSIONS = """
    SELECT current_setting('server_version') || ', ' || split_part(citus_version(), ' on ', 1)
        || ', fsync ' || current_setting('fsync')
"""
PARTS = (("server",), ("postgresql", "workers"))
TASKS = re.compile(r"Task Count: (\d+)")
# Steps that read all rows of a shard, or that copy rows to the coordinator before the rest of the statement.
WHOLE = re.compile(r"Seq Scan on (?:users|posts)|Distributed Subplan")


@dataclass(frozen=True)
class Target:
    """A server of one of the databases, and the processes of the nodes that have the database."""

    server: Started
    channel: grpc.Channel
    coordinator: int
    workers: Sequence[int]
    calls: Mapping[str, Call]
    streams: Mapping[str, Stream]
    numbers: Mapping[str, Iterator[int]] = field(default_factory=lambda: defaultdict(count))

    def run(self, name: str, seconds: float) -> Run:
        """Run calls for some seconds, or a stream."""
        return self.run_calls(name, seconds) if name in self.calls else self.run_stream(name)

    def run_calls(self, name: str, seconds: float) -> Run:
        """Make one call after another."""
        calls = self.calls[name]
        latencies: list[float] = []
        most = calls.calls or sys.maxsize
        clock = self._clock()
        end = perf_counter() + seconds
        while len(latencies) < LEAST or (len(latencies) < most and perf_counter() < end):
            message = calls.request(next(self.numbers[name])).SerializeToString()
            began = perf_counter()
            send(self.channel, name, message)
            latencies.append(perf_counter() - began)
        return clock.stop(len(latencies) * calls.units, p50=median(latencies) / calls.units)

    def run_stream(self, name: str) -> Run:
        """Send a bulk stream from a process of its own; raises RuntimeError unless each row is written."""
        stream = self.streams[name]
        messages = stream.messages(next(self.numbers[name]))
        with TemporaryDirectory(prefix="roster-bench-") as folder:
            file = Path(folder, "stream")
            file.write_bytes(pickle.dumps(messages))
            command = (sys.executable, "-m", "bench.worker", "stream", path(name), file, self.server.address)
            with start_process(*command) as client:
                expect("ready", client, "")
                clock = self._clock()
                answer = json.loads(ask(client, "\n"))
                run = clock.stop(stream.rows)
        if stream.rows not in (answer["created"], answer["updated"], answer["deleted"]):
            raise RuntimeError(f"{name}: {answer} instead of {stream.rows} rows")
        return run

    def _clock(self) -> Clock:
        return Clock(server=self.server.pid, postgresql=self.coordinator, workers=self.workers)


def send(channel: Any, name: str, message: bytes) -> bytes:
    """Make a call of the method with which a name begins, and return the last message of the answer."""
    if not name.startswith("Export"):
        return bytes(channel.unary_unary(path(name))(message))
    answer = b""
    for answer in channel.unary_stream(path(name))(message):
        pass
    return answer


@dataclass(frozen=True)
class Plan:
    """How a read is executed: its statements, the shards that they ask, and steps that read or copy much."""

    statements: float
    shards: float
    whole: Sequence[str]


def read_plan(lines: Iterable[str], statements: int, units: int = 1) -> Plan:
    """Return the plan of a unit of a call, from what EXPLAIN has printed for all statements."""
    text = "\n".join(lines)
    shards = sum(map(int, TASKS.findall(text)))
    return Plan(statements / units, shards / units, sorted(set(WHOLE.findall(text))))


async def explain(url: str, calls: Iterable[Call]) -> dict[str, Plan]:
    """Make each call in a server of this process, and explain the statements that it sends."""
    plans = {}
    driver: Any = await asyncpg.connect(url)
    async with serve(url, metrics_listen="") as server:
        with grpc.insecure_channel(server.address) as channel:
            for call in calls:
                make = partial(send, channel, call.name, call.request(0).SerializeToString())
                await asyncio.to_thread(make)  # opens connections, and fills caches
                with record_statements() as statements:
                    await asyncio.to_thread(make)
                lines = [line for statement in statements for line in await _explain(driver, statement)]
                plans[call.name] = read_plan(lines, len(statements), call.units)
    await driver.close()
    return plans


async def _explain(driver: Any, statement: Statement) -> list[str]:
    return [
        line for [line] in await driver.fetch(f"EXPLAIN (COSTS off) {statement.sql}", *statement.parameters)
    ]


@asynccontextmanager
async def create_databases(url: str) -> AsyncIterator[dict[str, tuple[str, Sequence[Postgres]]]]:
    """Yield the URLs of the three databases, without rows, and their nodes."""
    cluster, coordinator = CitusCluster(make_url(url)), Postgres(make_url(url))
    nodes = await cluster.nodes()
    host, port = nodes[0].url.host, nodes[0].url.port
    async with (
        coordinator.database("template0") as plain,
        coordinator.database("template0") as one,
        cluster.template() as template,
        cluster.database(template) as three,
    ):
        await asyncio.to_thread(migrations.upgrade, plain)
        await execute(
            plain_url(one),
            "CREATE EXTENSION citus",
            f"SELECT citus_set_coordinator_host('{host}', {port})",
            f"SELECT citus_set_node_property('{host}', {port}, 'shouldhaveshards', true)",
        )
        await asyncio.to_thread(migrations.upgrade, one)
        await distribute(one)
        yield {PLAIN: (plain, nodes[:1]), ONE: (one, nodes[:1]), THREE: (three, nodes)}


async def start(stack: AsyncExitStack, url: str, nodes: Sequence[Postgres], rows: Rows) -> Target:
    """Fill a database, and start a server."""
    await execute(url, *rows.fill(), "VACUUM ANALYZE users", "VACUUM ANALYZE posts")
    coordinator, *workers = [await find_postmaster(node) for node in nodes]
    server = stack.enter_context(start_server(ROSTER, url))
    channel = stack.enter_context(grpc.insecure_channel(server.address))
    token = await asyncio.to_thread(find_page, channel, rows.posts // 4)
    calls = {call.name: call for call in (*rows.reads(token), *rows.writes())}
    streams = {stream.name: stream for stream in rows.streams()}
    return Target(server, channel, coordinator, workers, calls, streams)


async def find_postmaster(node: Postgres) -> int:
    """Return the pid of a node, or 0 if it is on another machine."""
    return int(await node.fetch(POSTMASTER)) if node.url.host in LOCAL else 0


def find_page(channel: grpc.Channel, rows: int) -> str:
    """Return the token of the page of posts after some rows."""
    token = ""
    for _ in range(rows // DEPTH):
        request = ListPostsRequest(page_size=DEPTH, page_token=token)
        answer = send(channel, "ListPosts", request.SerializeToString())
        token = ListPostsResponse.FromString(answer).next_page_token
    return token


async def compare(name: str, targets: Mapping[str, Target], rounds: int, seconds: float) -> Table:
    """Run calls or a stream in turns; calls after a warm-up."""
    is_call = all(name in target.calls for target in targets.values())
    if is_call:
        for target in targets.values():
            await asyncio.to_thread(target.run_calls, name, 0)
    things: dict[str, Thing] = {
        database: partial(asyncio.to_thread, target.run, name, seconds)
        for database, target in targets.items()
    }
    runs = await take_turns(name, things, rounds)
    return Table(name, name, "rows", PLAIN, runs, value="p50" if is_call else "rate")


async def measure(url: str, arguments: argparse.Namespace) -> None:
    """Measure everything, and report each group as soon as it is complete."""
    rows = Rows(arguments.posts)
    described = machine(await Postgres(make_url(url)).fetch(VERSIONS))
    print(described)
    async with create_databases(url) as databases, AsyncExitStack() as stack:
        targets = {
            name: await start(stack, plain_url(database), nodes, rows)
            for name, (database, nodes) in databases.items()
        }
        reads, writes, streams = [
            [thing.name for thing in things if arguments.only in thing.name]
            for things in (rows.reads(""), rows.writes(), rows.streams())
        ]
        calls = [targets[THREE].calls[name] for name in reads]
        plans = await explain(plain_url(databases[THREE][0]), calls)
        for title, names in (("Reads", reads), ("Writes", writes), ("Bulk streams", streams)):
            tables = [await compare(name, targets, arguments.rounds, arguments.seconds) for name in names]
            if tables:
                print(f"\n{title}\n\n{as_markdown(tables, plans)}", flush=True)
            if arguments.json:
                for table in tables:
                    save(table, described, arguments.json)


def as_markdown(tables: Sequence[Table], plans: Mapping[str, Plan]) -> str:
    """Return one table of the medians of several, a row each; CPU is per call or row."""
    planned = ["statements", "shards asked", "read whole"] if tables[0].name in plans else []
    values = [f"{heading(tables[0])}: {database}" for database in tables[0].runs]
    lines = [["", *planned, *values, "µs server", "µs PostgreSQL, + workers"]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for table in tables:
        cells = [table.name, *(_plan(plans[table.name]) if planned else [])]
        cells += [three_digits(median(table.values(database))) for database in table.runs]
        cells += [" / ".join(_cpu(runs, *parts) for runs in table.runs.values()) for parts in PARTS]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _plan(plan: Plan) -> list[str]:
    return [f"{plan.statements:g}", f"{plan.shards:g}", ", ".join(plan.whole)]


def _cpu(runs: Sequence[Run], *parts: str) -> str:
    figures = [median(run.cpu(part) for run in runs) for part in parts]
    return " + ".join(three_digits(figure) for figure in figures if figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.citus", description=__doc__.partition("\n")[0])
    parser.add_argument("--posts", type=int, default=400_000, help="posts; there are a 20th as many users")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the medians are over these")
    parser.add_argument("--seconds", type=float, default=1, help="duration of each run of calls")
    parser.add_argument("--only", default="", help="only calls and streams with this in their name")
    parser.add_argument("--json", type=Path, help="add every run to this file")
    arguments = parser.parse_args()
    if not (url := os.environ.get("ROSTER_TEST_CITUS_URL")):
        sys.exit(
            "ROSTER_TEST_CITUS_URL is not set: it names a database of the coordinator of a Citus cluster"
        )
    asyncio.run(measure(url, arguments))


if __name__ == "__main__":
    main()
