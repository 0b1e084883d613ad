"""`make bench-bulk`: the bulk streams, each beside a reference of the same run."""

import argparse
import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bench.cases import NAMES, Case, Cases
from bench.databases import PostgreSQL, Sqlite, scalar
from bench.measure import Run, Way, run
from bench.report import Result, as_json, as_table, machine
from tests.support.postgres import PostgresServer

Store = PostgreSQL | Sqlite


async def measured(cases: list[Case], stores: dict[str, Store], rounds: int) -> list[Result]:
    """Run all ways and references in turn, so many rounds; which of a pair goes first changes."""
    results = [Result(case, [], []) for case in cases]
    async with AsyncExitStack() as open_templates:
        templates = [
            await open_templates.enter_async_context(stores[case.database].template(case.users))
            for case in cases
        ]
        for number in range(rounds):
            for result, template in zip(results, templates, strict=True):
                print(f"round {number + 1} of {rounds}: {result.case.title}", file=sys.stderr)
                store = stores[result.case.database]
                await _add_round(result, store, template, reference_first=number % 2 == 0)
    return results


async def _add_round(result: Result, store: Store, template: str, *, reference_first: bool) -> None:
    case = result.case
    pair = [(case.reference, result.references), (case.way, result.runs)]
    for way, runs in pair if reference_first else reversed(pair):
        runs.append(await _checked(case, way, store, template))


async def _checked(case: Case, way: Way, store: Store, template: str) -> Run:
    async with store.database(template) as url:
        measurement = run(way, url, store.pid)
        result = await scalar(url, case.check)
    if result != case.result:
        raise RuntimeError(f"{case.name}, {way.name}: {case.check} is {result}, not {case.result}")
    return measurement


async def main(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="roster-bench-") as name, PostgresServer(fsync=True) as server:
        folder = Path(name)
        postgresql = PostgreSQL(server)
        await postgresql.set_up()
        make = Cases(folder, arguments.rows, "bench" if arguments.load_id else "")
        cases = [make.case(name) for name in arguments.only or NAMES]
        results = await measured(
            cases, {"postgresql": postgresql, "sqlite": Sqlite(folder)}, arguments.rounds
        )
    if arguments.json:
        print(json.dumps({"machine": machine(postgresql.version), "cases": as_json(results)}, indent=2))
    else:
        print(machine(postgresql.version))
        Console(width=120).print(as_table(results))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the largest cases")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of so many runs")
    parser.add_argument("--only", choices=NAMES, action="append", help="one case; may come several times")
    parser.add_argument("--load-id", action="store_true", help="name the loads: outcomes are kept")
    parser.add_argument("--json", action="store_true", help="print every run as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parsed()))
