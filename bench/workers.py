"""Two processes of Roster next to one: what a second core gives."""

import asyncio
import os
import pickle
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from bench.databases import PostgreSQL
from bench.load import Load, write_requests
from bench.measure import Clock, Run, Thing, ask, start_process, take_turns
from bench.options import Options
from bench.report import Table
from bench.rows import bulk_options, copy_text, make_users, requests, user_message
from bench.servers import ROSTER, Started, start_server
from roster.v1.users_pb2 import BulkCreateUsersRequest, GetUserRequest

TABLES = ("workers-get", "workers-bulk")
IN_FLIGHT = 64
CONNECTIONS = 16  # which the kernel distributes among the workers
STREAMS = 2
METHOD = "/roster.v1.UserService/BulkCreateUsers"
ONE, TWO = "1 process", "2 processes"
ONE_STREAM, TWO_STREAMS, EACH = "1 process, 1 stream", "1 process, 2 streams", "2 processes, 1 stream each"


async def get(options: Options, folder: Path, postgresql: PostgreSQL) -> Table:
    """Compare two workers on one port with one; the generator is pinned to one core."""
    users, random = folder / "workers.txt", Random(1)
    users.write_text(copy_text(make_users(options.rows)))
    calls = [GetUserRequest(id=random.randint(1, options.rows)) for _ in range(5000)]
    path = write_requests(folder / "workers.requests", calls)
    load = Load("UserService/GetUser", path, IN_FLIGHT, options.seconds, connections=CONNECTIONS)
    core = str(max(os.sched_getaffinity(0)))
    async with AsyncExitStack() as stack:
        template = await stack.enter_async_context(postgresql.template(users))
        url = await stack.enter_async_context(postgresql.database(template))
        things: dict[str, Thing] = {}
        for name, workers in ((ONE, 1), (TWO, 2)):
            server = stack.enter_context(start_server(ROSTER, url, ROSTER_WORKERS=str(workers)))
            run = partial(load.run, server.address, server.pid, postgresql.pid, core)
            things[name] = partial(asyncio.to_thread, run)
            await things[name]()  # warm-up
        runs = await take_turns("workers", things, options.rounds)
    return Table("workers-get", f"GetUser, {IN_FLIGHT} in flight, by processes", "calls", ONE, runs)


async def bulk(options: Options, folder: Path, postgresql: PostgreSQL) -> Table:
    """Compare a load in two streams, each to its own process, with one stream."""
    users = make_users(options.rows)
    whole = [_write(folder / "whole", users)]
    halves = [_write(folder / f"half{start}", users[start::STREAMS]) for start in range(STREAMS)]
    async with postgresql.template(None) as template:

        async def measure(servers: int, files: Sequence[Path]) -> Run:
            async with postgresql.database(template) as url:
                return await asyncio.to_thread(_load, url, servers, files, len(users), postgresql.pid)

        things: dict[str, Thing] = {
            ONE_STREAM: partial(measure, 1, whole),
            TWO_STREAMS: partial(measure, 1, halves),
            EACH: partial(measure, STREAMS, halves),
        }
        runs = await take_turns("workers, bulk", things, options.rounds)
    return Table("workers-bulk", "BulkCreateUsers, by processes and streams", "rows", ONE_STREAM, runs)


def _write(path: Path, users: Sequence[object]) -> Path:
    messages = requests(
        BulkCreateUsersRequest, "users", list(map(user_message, users)), bulk_options(path.name)
    )
    path.write_bytes(pickle.dumps(messages))
    return path


def _load(url: str, servers: int, files: Sequence[Path], rows: int, postmaster: int) -> Run:
    """Send each file in a stream, to the servers in turn; each server is a process with its own port."""
    with ExitStack() as stack:
        started: list[Started] = [stack.enter_context(start_server(ROSTER, url)) for _ in range(servers)]
        clients = []
        for number, file in enumerate(files):
            address = started[number % servers].address
            command = (sys.executable, "-m", "bench.worker", "stream", METHOD, file, address)
            clients.append(stack.enter_context(start_process(*command)))
            ask(clients[-1], "")  # until it is ready
        clocks = [Clock(server=server.pid) for server in started]
        clock = Clock(postgresql=postmaster)
        for client in clients:
            client.stdin.write("\n")
            client.stdin.flush()
        for client in clients:
            if not client.stdout.readline():
                raise RuntimeError("a client failed")
        run = clock.stop(rows)
        return replace(run, server=sum(each.stop(rows).server for each in clocks))


async def run(
    options: Options, names: Iterable[str], folder: Path, postgresql: PostgreSQL
) -> AsyncIterator[Table]:
    """Yield the tables of these names."""
    tables = {"workers-get": get, "workers-bulk": bulk}
    for name in names:
        yield await tables[name](options, folder, postgresql)
