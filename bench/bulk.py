"""`make bench-bulk`: measures the bulk streams, each next to a reference in the same run."""

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
from bench.measure import Approach, Run, run
from bench.report import Result, as_json, as_table, machine
from tests.support.postgres import PostgresServer

Store = PostgreSQL | Sqlite


async def measure(cases: list[Case], stores: dict[str, Store], rounds: int) -> list[Result]:
    """Run each approach and its reference once per round; which of the two runs first alternates."""
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
    pair = [(case.reference, result.references), (case.approach, result.runs)]
    for approach, runs in pair if reference_first else reversed(pair):
        runs.append(await _run_and_check(case, approach, store, template))


async def _run_and_check(case: Case, approach: Approach, store: Store, template: str) -> Run:
    async with store.database(template) as url:
        measurement = run(approach, url, store.pid)
        result = await scalar(url, case.check)
    if result != case.result:
        raise RuntimeError(f"{case.name}, {approach.name}: {case.check} is {result}, not {case.result}")
    return measurement


async def main(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="roster-bench-") as name, PostgresServer(fsync=True) as server:
        folder = Path(name)
        postgresql = PostgreSQL(server)
        await postgresql.set_up()
        make = Cases(folder, arguments.rows, "bench" if arguments.load_id else "")
        cases = [make.case(name) for name in arguments.only or NAMES]
        results = await measure(cases, {"postgresql": postgresql, "sqlite": Sqlite(folder)}, arguments.rounds)
    if arguments.json:
        print(json.dumps({"machine": machine(postgresql.version), "cases": as_json(results)}, indent=2))
    else:
        print(machine(postgresql.version))
        Console(width=120).print(as_table(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the largest cases")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the medians are over these")
    parser.add_argument("--only", choices=NAMES, action="append", help="run only this case; can be repeated")
    parser.add_argument(
        "--load-id",
        action="store_true",
        help="name the loads, so that the server stores the outcome of every row",
    )
    parser.add_argument("--json", action="store_true", help="print every run as JSON instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
