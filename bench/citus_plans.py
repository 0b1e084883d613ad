"""The plans of reads on Citus."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import grpc

from bench.citus_calls import Call
from tests.support.server import serve
from tests.support.statements import Statement, record_statements

# Only ANALYZE plans the last step after the steps before it, whose results decide the plan.
EXPLAIN = "EXPLAIN (ANALYZE, COSTS off, TIMING off, SUMMARY off)"
TASKS = re.compile(r"Task Count: (\d+)")
SCANS = re.compile(r"Seq Scan on (users|posts)")
RECEIVED = re.compile(r"Tuple data received from nodes: (\d+) (bytes|kB|MB|GB)")
BYTES = {"bytes": 1, "kB": 1024, "MB": 1024**2, "GB": 1024**3}


@dataclass(frozen=True)
class Plan:
    """How a read is executed: its statements, the shards they ask, and the KiB that the coordinator receives.

    `scanned` are the tables of which all rows of a shard are read.
    """

    statements: float
    shards: float
    scanned: Sequence[str]
    received: float


def read_plan(lines: Iterable[str], statements: int, units: int = 1) -> Plan:
    """Return the plan of a unit of a call, from what EXPLAIN has printed for all statements."""
    text = "\n".join(lines)
    shards = sum(map(int, TASKS.findall(text)))
    received = sum(int(size) * BYTES[unit] for size, unit in RECEIVED.findall(text))
    return Plan(statements / units, shards / units, sorted(set(SCANS.findall(text))), received / 1024 / units)


async def explain(url: str, calls: Iterable[Call]) -> dict[str, Plan]:
    """Make each call in a server of this process, and explain the statements that it sends."""
    plans = {}
    driver: Any = await asyncpg.connect(url)
    async with serve(url, metrics_listen="") as server:
        with grpc.insecure_channel(server.address) as channel:
            for call in calls:
                make = partial(call.send, channel, 0)
                await asyncio.to_thread(make)  # opens connections, and fills caches
                with record_statements() as recorded:
                    await asyncio.to_thread(make)
                # The pool's own statements read no table.
                statements = [statement for statement in recorded if "FROM" in statement.sql]
                lines = [line for statement in statements for line in await _explain(driver, statement)]
                plans[call.name] = read_plan(lines, len(statements), call.units)
    await driver.close()
    return plans


async def _explain(driver: Any, statement: Statement) -> list[str]:
    rows = await driver.fetch(f"{EXPLAIN} {statement.sql}", *statement.parameters)
    return [line for [line] in rows]
