"""`make bench-read`: measures reads, each next to references in the same run, on PostgreSQL and SQLite."""

import argparse
import asyncio
import json
import pickle
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import grpc
from rich.console import Console

from bench.databases import PSQL, PostgreSQL, Sqlite
from bench.measure import ask, cpu_seconds, start_process, start_server
from bench.read_report import BARE, IN_FLIGHT, ReadRun, as_json, as_tables, draw
from bench.report import machine
from bench.rows import copy_text, make_users
from roster.v1.users_pb2 import BatchGetUsersRequest, ExportUsersRequest, GetUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.postgres import PostgresServer

USERS = "/roster.v1.UserService"
REFERENCE = "/roster.bench.Reference"
BATCH = 100
DIFFERENT = 2000  # distinct requests, which a client sends over and over
COPY_TO = (
    r"\copy (SELECT id, email, full_name, is_active, created_at, updated_at, version FROM users ORDER BY id) "
    "to '/dev/null'"
)


class Workloads:
    """The workloads of the client, with their requests in files of a folder."""

    def __init__(self, folder: Path, rows: int, seconds: float) -> None:
        self._folder = folder
        self._rows = rows
        self._seconds = seconds

    def all(self, address: str) -> dict[str, dict[str, Any]]:
        """Return every workload by its name."""
        return self._single() | self._many(address)

    def _single(self) -> dict[str, dict[str, Any]]:
        random = Random(1)
        ids = [random.randint(1, self._rows) for _ in range(DIFFERENT)]
        file = self._write("get", [GetUserRequest(id=id) for id in ids])
        methods = {
            "no-op": f"{REFERENCE}/NoOp",
            "GetUser": f"{USERS}/GetUser",
            "textbook": f"{REFERENCE}/Textbook",
        }
        return {
            f"{name}, {number} in flight": self._calls(method, file, number)
            for number in IN_FLIGHT
            for name, method in methods.items()
        } | {BARE: self._calls(methods["GetUser"], file, 64, port=1)}

    def _many(self, address: str) -> dict[str, dict[str, Any]]:
        random = Random(2)
        ids = range(1, self._rows + 1)
        batches = [BatchGetUsersRequest(ids=random.sample(ids, BATCH)) for _ in range(DIFFERENT // 10)]
        pages = {"0": "", "400k": _token_at(address, self._rows * 4 // 5)}
        loads = {
            f"ListUsers of 100 at depth {depth}": self._calls(
                f"{USERS}/ListUsers",
                self._write(f"list{depth}", [ListUsersRequest(page_size=BATCH, page_token=token)]),
                1,
            )
            for depth, token in pages.items()
        }
        loads["BatchGetUsers of 100"] = self._calls(
            f"{USERS}/BatchGetUsers", self._write("batch", batches), 16
        )
        loads["ExportUsers"] = {
            "method": f"{USERS}/ExportUsers",
            "request": ExportUsersRequest().SerializeToString().hex(),
        }
        return loads

    def _calls(self, method: str, file: str, in_flight: int, port: int = 0) -> dict[str, Any]:
        load = {"method": method, "file": file, "in_flight": in_flight, "port": port}
        return load | {"seconds": self._seconds}

    def _write(self, name: str, requests: list[Any]) -> str:
        path = self._folder / f"{name}.requests"
        path.write_bytes(pickle.dumps([request.SerializeToString() for request in requests]))
        return str(path)


def _token_at(address: str, depth: int) -> str:
    """Return the token of the page after this many rows, by reading all pages before it."""
    token = ""
    with grpc.insecure_channel(address) as channel:
        users = UserServiceStub(channel)
        for _ in range(depth // 1000):
            token = users.ListUsers(ListUsersRequest(page_size=1000, page_token=token)).next_page_token
    return token


@contextmanager
def client_of(url: str, options: list[str]) -> Iterator[tuple[int, str, Any]]:
    """Start a server and a client; yield the server's pid and address, and the client."""
    with (
        start_server(url, "bench.read_server", *options) as (server, addresses),
        start_process(sys.executable, "-m", "bench.read_client", *addresses.split()) as client,
    ):
        yield server, addresses.split()[0], client


def measure(
    url: str, postmaster: int, loads: Workloads, arguments: argparse.Namespace
) -> dict[str, list[ReadRun]]:
    """Run all workloads once per round; every other round runs in reverse order."""
    seen: dict[str, list[ReadRun]] = defaultdict(list)
    options = [f"--{name}" for name in ("asyncio", "lines") if getattr(arguments, name)]
    with client_of(url, options) as (server, address, client):
        work = loads.all(address)
        if arguments.only:
            work = {name: load for name, load in work.items() if any(part in name for part in arguments.only)}
        for load in work.values():  # warm-up: connections, statements and plans
            ask(client, json.dumps(load | ({"seconds": 0.3} if "seconds" in load else {})) + "\n")
        for number in range(arguments.rounds):
            print(f"{url.partition(':')[0]}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
            for name in list(work)[:: -1 if number % 2 else 1]:
                seen[name].append(_one(client, work[name], server, postmaster))
            if postmaster and not arguments.only:
                seen[r"psql \copy to"].append(_copy(url, arguments.rows))
    for runs in (seen["ExportUsers"], seen[r"psql \copy to"]):
        if any(run.count != arguments.rows for run in runs):
            raise RuntimeError(f"not all rows were read: {[run.count for run in runs]}")
    return {name: runs for name, runs in seen.items() if runs}


def _one(client: Any, load: dict[str, Any], server: int, postmaster: int) -> ReadRun:
    before = cpu_seconds(server), cpu_seconds(postmaster)
    answer = json.loads(ask(client, json.dumps(load) + "\n"))
    after = cpu_seconds(server), cpu_seconds(postmaster)
    return ReadRun(**answer, server=after[0] - before[0], postgresql=after[1] - before[1])


def _copy(url: str, rows: int) -> ReadRun:
    start = perf_counter()
    subprocess.run([*PSQL, url, "--command", COPY_TO], check=True)
    return ReadRun(rows, perf_counter() - start)


async def main(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="roster-bench-") as name, PostgresServer(fsync=True) as server:
        folder = Path(name)
        users = folder / "users.txt"
        users.write_text(copy_text(make_users(arguments.rows)))
        postgresql = PostgreSQL(server)
        await postgresql.set_up()
        loads = Workloads(folder, arguments.rows, arguments.seconds)
        seen = {}
        for store in (postgresql, Sqlite(folder)):
            async with AsyncExitStack() as stack:
                template = await stack.enter_async_context(store.template(users))
                url = await stack.enter_async_context(store.database(template))
                seen[type(store).__name__] = await asyncio.to_thread(
                    measure, url, store.pid, loads, arguments
                )
    if arguments.plot:
        draw(seen, arguments.plot)
    if arguments.json:
        print(json.dumps({"machine": machine(postgresql.version), "databases": as_json(seen)}, indent=2))
    else:
        print(machine(postgresql.version))
        Console(width=120).print(*as_tables(seen), sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.read", description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000, help="users in the table")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the medians are over these")
    parser.add_argument("--seconds", type=float, default=3, help="duration of each workload")
    parser.add_argument(
        "--only", action="append", help="run only workloads whose names contain this; can be repeated"
    )
    parser.add_argument(
        "--asyncio", action="store_true", help="use asyncio's own event loop instead of uvloop"
    )
    parser.add_argument(
        "--lines", action="store_true", help="log each call, as `roster serve` does by default"
    )
    parser.add_argument("--plot", type=Path, help="draw the calls per second into this SVG file")
    parser.add_argument("--json", action="store_true", help="print every run as JSON instead of the tables")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
