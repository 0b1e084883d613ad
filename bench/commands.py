"""The commands: files in and out next to psql, how long a start takes, and how much memory a server uses."""

import asyncio
import csv
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc

from bench.databases import PSQL, PostgreSQL, scalar
from bench.measure import Clock, Run, Runs, Thing, take_turns
from bench.options import Options
from bench.report import Table
from bench.rows import BATCH, argon2id, bulk_options, copy_text, make_users
from bench.servers import ROSTER, start_server
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub

TABLES = ("load-file", "export-file", "start", "memory")
PROGRAM = (sys.executable, "-m", "service")
COLUMNS = "id, email, full_name, is_active, created_at, updated_at, version"
COPY_CSV = (
    r"\copy users (email, full_name, hashed_password, is_active) from '{file}' with (format csv, header)"
)
COPY_TO_CSV = rf"\copy (SELECT {COLUMNS} FROM users ORDER BY id) to '{{file}}' with (format csv, header)"
COPY = r"\copy, CSV"
COPY_AGAIN = r"\copy again"
FORMATS = ("ndjson", "csv", "parquet")
SETTLED_SECONDS = 2  # after a start, until the memory of an idle server is read
MEASURED_ROWS = (500_000, 5_000_000)


async def load_file(options: Options, folder: Path, postgresql: PostgreSQL) -> Table:
    r"""Load a CSV file from the start of the command to its end."""
    file = folder / "users.csv"
    with file.open("w", newline="") as text:
        lines = csv.writer(text)
        lines.writerow(("email", "full_name", "hashed_password", "is_active"))
        lines.writerows(make_users(options.rows))
    async with postgresql.template(None) as template:

        async def measure(thing: Any) -> Run:
            async with postgresql.database(template) as url:
                run: Run = await asyncio.to_thread(thing, url)
                if await scalar(url, "SELECT count(*) FROM users") != options.rows:
                    raise RuntimeError("not all rows were loaded")
                return run

        def load(url: str) -> Run:
            with start_server(ROSTER, url) as server:
                command = (*PROGRAM, "load", "users", file, "--address", server.address)
                return _time(options.rows, *command, server=server.pid, postgresql=postgresql.pid)

        def copy(url: str) -> Run:
            command = (*PSQL, url, "--command", COPY_CSV.format(file=file))
            return _time(options.rows, *command, postgresql=postgresql.pid)

        things = {"roster load, CSV": load, COPY: copy, COPY_AGAIN: copy}
        turns = {name: partial(measure, thing) for name, thing in things.items()}
        runs = await take_turns("load a file", turns, options.rounds)
    return Table(
        "load-file", f"A CSV file of {options.rows:,} users, from file to commit", "rows", COPY, runs
    )


async def export_file(options: Options, folder: Path, postgresql: PostgreSQL) -> Table:
    """Export users to files of each format."""
    users = folder / "exported.txt"
    users.write_text(copy_text(make_users(options.rows)))
    async with AsyncExitStack() as stack:
        template = await stack.enter_async_context(postgresql.template(users))
        url = await stack.enter_async_context(postgresql.database(template))
        server = stack.enter_context(start_server(ROSTER, url))
        processes = {"server": server.pid, "postgresql": postgresql.pid}

        def export(extension: str) -> Run:
            file = folder / f"exported.{extension}"
            command = (*PROGRAM, "export", "users", "--output", file, "--address", server.address)
            run = _time(options.rows, *command, **processes)
            file.unlink()
            return run

        def copy() -> Run:
            script = COPY_TO_CSV.format(file=folder / "copied.csv")
            return _time(options.rows, *PSQL, url, "--command", script, postgresql=postgresql.pid)

        things: dict[str, Thing] = {
            f"roster export, {name}": partial(asyncio.to_thread, export, name) for name in FORMATS
        }
        things |= dict.fromkeys((COPY, COPY_AGAIN), partial(asyncio.to_thread, copy))
        runs = await take_turns("export to a file", things, options.rounds)
    return Table("export-file", f"Files of {options.rows:,} users", "rows", COPY, runs)


async def start(options: Options, folder: Path, postgresql: PostgreSQL) -> Table:  # noqa: ARG001
    """Measure how long commands take to start."""
    async with postgresql.template(None) as template, postgresql.database(template) as url:

        def serve() -> Run:
            with start_server(ROSTER, url) as server:
                return Run(1, server.seconds)

        commands = {
            "roster --help": (*PROGRAM, "--help"),
            "roster load --help": (*PROGRAM, "load", "--help"),
            "python -c pass": (sys.executable, "-c", "pass"),
        }
        things: dict[str, Thing] = {"roster serve, until it listens": partial(asyncio.to_thread, serve)}
        things |= {name: partial(asyncio.to_thread, _time, 1, *each) for name, each in commands.items()}
        runs = await take_turns("start", things, options.rounds)
    return Table("start", "Seconds until a command has started", "", "python -c pass", runs, value="seconds")


async def memory(options: Options, folder: Path, postgresql: PostgreSQL) -> Table:  # noqa: ARG001
    """Measure the resident memory of an idle server, and during a load."""
    async with postgresql.template(None) as template, postgresql.database(template) as url:
        with start_server(ROSTER, url) as server, grpc.insecure_channel(server.address) as channel:
            await asyncio.sleep(SETTLED_SECONDS)
            runs: Runs = {"idle": [_memory(server.pid)]}
            for response in UserServiceStub(channel).BulkCreateUsers(_endless_load()):
                if response.ack.next_offset in MEASURED_ROWS:
                    name = f"after {response.ack.next_offset:,} rows of a load"
                    runs[name] = [_memory(server.pid)]
    return Table("memory", "Resident memory of a server", "", "idle", runs, value="mib")


def _time(count: int, *command: str | Path, **processes: int) -> Run:
    clock = Clock(**processes)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return clock.stop(count)


def _endless_load() -> Iterator[BulkCreateUsersRequest]:
    random = Random(1)
    for offset in range(0, MEASURED_ROWS[-1], BATCH):
        users = [
            User(
                email=f"user{number}@example.org", full_name="Ada Lovelace", hashed_password=argon2id(random)
            )
            for number in range(offset, offset + BATCH)
        ]
        yield BulkCreateUsersRequest(
            options=bulk_options("bench") if offset == 0 else None,
            offset=offset,
            users=users,
            finish=offset + BATCH == MEASURED_ROWS[-1],
        )


def _memory(pid: int) -> Run:
    """Return a run that took no time."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return Run(1, 0, mib=kib / 1024)


async def run(
    options: Options, names: Iterable[str], folder: Path, postgresql: PostgreSQL
) -> AsyncIterator[Table]:
    """Yield the tables of these names."""
    tables = {"load-file": load_file, "export-file": export_file, "start": start, "memory": memory}
    for name in names:
        yield await tables[name](options, folder, postgresql)
