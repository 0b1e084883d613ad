"""`make bench`, `make bench-read`, …: measures Roster and other ways to do the same work, in turns."""

import argparse
import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import bulk, changes, commands, read, workers
from bench.databases import PostgreSQL
from bench.options import Options
from bench.peers.build import LOAD
from bench.plot import draw
from bench.report import Table, as_markdown, machine, save
from tests.support.postgres import PostgresServer

GROUPS = {"read": read, "bulk": bulk, "changes": changes, "commands": commands, "workers": workers}
TABLES = [name for group in GROUPS.values() for name in group.TABLES]


async def measure(arguments: argparse.Namespace) -> None:
    """Measure the tables that the arguments name, and report each as soon as it is complete."""
    options = Options(arguments.rounds, arguments.rows, arguments.seconds)
    groups = GROUPS if arguments.group == "all" else [arguments.group]
    with TemporaryDirectory(prefix="roster-bench-") as folder, PostgresServer(fsync=True) as server:
        postgresql = PostgreSQL(server)
        await postgresql.set_up()
        described = machine(postgresql.version)
        print(described)
        for group in groups:
            names = [name for name in GROUPS[group].TABLES if name in (arguments.only or TABLES)]
            if names:
                async for table in GROUPS[group].run(options, names, subfolder(folder, group), postgresql):
                    report(table, described, arguments)


def subfolder(folder: str, name: str) -> Path:
    """Create a folder for the files of a group."""
    path = Path(folder, name)
    path.mkdir()
    return path


def report(table: Table, described: str, arguments: argparse.Namespace) -> None:
    """Print a table, and write the files that the arguments name."""
    print(f"\n{table.title}\n\n{as_markdown(table)}", flush=True)
    if arguments.json:
        save(table, described, arguments.json)
    if arguments.plot:
        draw(table, arguments.plot)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("group", choices=[*GROUPS, "all"], help="which tables to measure")
    parser.add_argument("--only", choices=TABLES, action="append", help="only this table; can be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; the medians are over these")
    parser.add_argument("--rows", type=int, default=200_000, help="users in the table, or to load")
    parser.add_argument("--seconds", type=float, default=1.5, help="duration of each run of calls")
    parser.add_argument("--json", type=Path, help="add every run to this file")
    parser.add_argument("--plot", type=Path, help="draw each table into an SVG file in this folder")
    return parser.parse_args()


def main() -> None:
    if not LOAD.exists():
        sys.exit("the load generator is not built: run `make bench-peers`, which needs Go 1.26 or newer")
    asyncio.run(measure(parse_arguments()))


if __name__ == "__main__":
    main()
