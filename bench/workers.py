"""`make bench-workers`: measures GetUser with several workers on one port, and with one worker."""

import argparse
import asyncio
import json
import os
import pickle
import sys
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.databases import PostgreSQL
from bench.measure import ask, cpu_seconds, start_process, start_server
from bench.report import machine
from bench.rows import copy_text, make_users
from roster.v1.users_pb2 import GetUserRequest
from tests.support.postgres import PostgresServer

ROWS = 100_000
CLIENTS = 4  # each with four connections, which the kernel distributes among the workers
IN_FLIGHT = 16  # of each client
METHOD = "/roster.v1.UserService/GetUser"


def measure(url: str, requests: Path, arguments: argparse.Namespace) -> dict[int, list[tuple[float, float]]]:
    """Return the calls per second and the server's CPU per call of each round, by number of workers."""
    load = {"method": METHOD, "file": str(requests), "in_flight": IN_FLIGHT, "port": 0}
    seen: dict[int, list[tuple[float, float]]] = {1: [], arguments.workers: []}
    with ExitStack() as stack:
        servers = {}
        for workers in seen:
            os.environ["ROSTER_WORKERS"] = str(workers)
            pid, address = stack.enter_context(start_server(url))
            clients = [
                stack.enter_context(start_process(sys.executable, "-m", "bench.read_client", address))
                for _ in range(CLIENTS)
            ]
            servers[workers] = pid, clients
            _run(clients, load | {"seconds": 1})  # warm-up: connections and statements
        for number in range(arguments.rounds):
            for workers in sorted(seen, reverse=number % 2 == 1):
                pid, clients = servers[workers]
                before = cpu_seconds(pid)
                answers = _run(clients, load | {"seconds": arguments.seconds})
                calls = sum(answer["count"] for answer in answers)
                rate = sum(answer["count"] / answer["seconds"] for answer in answers)
                seen[workers].append((rate, (cpu_seconds(pid) - before) / calls))
    return seen


def _run(clients: list[Any], load: dict[str, Any]) -> list[dict[str, float]]:
    for client in clients[:-1]:
        client.stdin.write(json.dumps(load) + "\n")
        client.stdin.flush()
    last = ask(clients[-1], json.dumps(load) + "\n")
    return [json.loads(line) for line in (*(client.stdout.readline() for client in clients[:-1]), last)]


async def main(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="roster-bench-") as name, PostgresServer(fsync=True) as server:
        folder, random = Path(name), Random(1)
        users, requests = folder / "users.txt", folder / "get.requests"
        users.write_text(copy_text(make_users(ROWS)))
        ids = (random.randint(1, ROWS) for _ in range(2000))
        requests.write_bytes(pickle.dumps([GetUserRequest(id=id).SerializeToString() for id in ids]))
        store = PostgreSQL(server)
        await store.set_up()
        async with AsyncExitStack() as stack:
            template = await stack.enter_async_context(store.template(users))
            url = await stack.enter_async_context(store.database(template))
            seen = await asyncio.to_thread(measure, url, requests, arguments)
    print(machine(store.version))
    for workers, runs in seen.items():
        rate, cpu = (median(values) for values in zip(*runs, strict=True))
        print(f"{workers} worker(s): {rate:,.0f} calls/s, {cpu * 1e6:,.0f} µs of the server's CPU per call")
    pairs = zip(seen[arguments.workers], seen[1], strict=True)
    print(f"ratio {median(many[0] / one[0] for many, one in pairs):.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="number of workers, 2 or more")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; the medians are over these")
    parser.add_argument("--seconds", type=float, default=2, help="seconds per run")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
