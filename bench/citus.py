"""Measures reads, writes and bulk streams without Citus, on one node and on three, and explains the reads.

    ROSTER_TEST_CITUS_URL=postgresql://… make bench-citus

The rows are the same in each of three databases, which take turns. Nodes on one machine share its cores: the
figures show what distribution costs, not what more machines give.
"""

import argparse
import asyncio
import json
import os
import pickle
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from time import perf_counter

import grpc
from sqlalchemy import make_url

from bench.citus_calls import Call, Rows, Stream, find_method
from bench.citus_plans import Plan, explain
from bench.databases import execute, plain_url
from bench.measure import Clock, Run, Thing, ask, expect, start_process, take_turns
from bench.report import Table, heading, machine, save, three_digits
from bench.servers import ROSTER, Started, start_server
from roster.v1.posts_pb2 import ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from service.db import migrations
from tests.support.citus import CitusCluster, distribute
from tests.support.postgres import Postgres

PLAIN, ONE, THREE = "plain", "one node", "three nodes"
LEAST = 5  # calls of a run, however long they take
DEPTH = 1000
LOCAL = {"127.0.0.1", "localhost", "::1"}
POSTMASTER = "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int"
VERSIONS = """
    SELECT current_setting('server_version') || ', ' || split_part(citus_version(), ' on ', 1)
        || ', fsync ' || current_setting('fsync')
"""
PLANNED = ["statements", "shards asked", "scanned whole", "KiB received"]
PARTS = (("server",), ("postgresql", "workers"))


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
            number = next(self.numbers[name])
            began = perf_counter()
            calls.send(self.channel, number)
            latencies.append(perf_counter() - began)
        return clock.stop(len(latencies) * calls.units, p50=median(latencies) / calls.units)

    def run_stream(self, name: str) -> Run:
        """Send a bulk stream from a process of its own; raises RuntimeError unless each row is written."""
        messages, rows = self.streams[name].messages(next(self.numbers[name]))
        method, _ = find_method(name)
        with NamedTemporaryFile(prefix="roster-bench-") as file:
            file.write(pickle.dumps(messages))
            file.flush()
            command = (sys.executable, "-m", "bench.worker", "stream", method, file.name, self.server.address)
            with start_process(*command) as client:
                expect("ready", client, "")
                clock = self._clock()
                answer = json.loads(ask(client, "\n"))
                run = clock.stop(rows)
        if rows not in (answer["created"], answer["updated"], answer["deleted"]):
            raise RuntimeError(f"{name}: {answer} instead of {rows} rows")
        return run

    def _clock(self) -> Clock:
        return Clock(server=self.server.pid, postgresql=self.coordinator, workers=self.workers)


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
    token = await asyncio.to_thread(find_page, channel, rows.posts // 10)
    calls = {call.name: call for call in (*rows.reads(token), *rows.writes())}
    streams = {stream.name: stream for stream in rows.streams()}
    return Target(server, channel, coordinator, workers, calls, streams)


async def find_postmaster(node: Postgres) -> int:
    """Return the pid of a node, or 0 if it is on another machine."""
    return int(await node.fetch(POSTMASTER)) if node.url.host in LOCAL else 0


def find_page(channel: grpc.Channel, rows: int) -> str:
    """Return the token of the page of posts after some rows."""
    token = ""
    stub = PostServiceStub(channel)
    for _ in range(rows // DEPTH):
        token = stub.ListPosts(ListPostsRequest(page_size=DEPTH, page_token=token)).next_page_token
    return token


async def compare(name: str, targets: Mapping[str, Target], rounds: int, seconds: float) -> Table:
    """Run calls or a stream in turns, after a warm-up."""
    for target in targets.values():
        await asyncio.to_thread(target.run, name, 0)
    things: dict[str, Thing] = {
        database: partial(asyncio.to_thread, target.run, name, seconds)
        for database, target in targets.items()
    }
    runs = await take_turns(name, things, rounds)
    return Table(name, name, "rows", PLAIN, runs, value="p50" if name in targets[PLAIN].calls else "rate")


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
    planned = PLANNED if tables[0].name in plans else []
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
    return [f"{plan.statements:g}", f"{plan.shards:g}", ", ".join(plan.scanned), f"{plan.received:,.0f}"]


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
