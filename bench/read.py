"""Reads: single users, batches, pages and exports, of Roster and its peers."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc

from bench.databases import PSQL, PostgreSQL, Sqlite
from bench.load import Load, write_requests
from bench.measure import Clock, Run, Thing, take_turns
from bench.options import Options
from bench.report import Table
from bench.rows import copy_text, make_users
from bench.servers import (
    AGAIN,
    GO,
    NO_OP,
    NODE,
    RAW,
    ROSTER,
    SERVERS,
    TEXTBOOK,
    Started,
    available,
    start_server,
)
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub

TABLES = ("get-1", "get-16", "get-64", "batch", "list", "export")
SQLITE = "Roster on SQLite"
COPY = r"\copy to"
COPY_AGAIN = r"\copy to again"
DEEP = "Roster, at 80 % of the table"
SINGLE = "Roster, GetUser"

PAGE = 100
DIFFERENT = 5000  # distinct requests, which the generator sends over and over
SOME, MANY = 16, 64  # calls in flight
COPY_TO = (
    r"\copy (SELECT id, email, full_name, is_active, created_at, updated_at, version FROM users "
    "WHERE id > {after} ORDER BY id) to '/dev/null'"
)


class Reads:
    """Runs the tables of reads: all servers are up, and take turns."""

    def __init__(
        self, options: Options, folder: Path, url: str, postmaster: int, servers: Mapping[str, Started]
    ) -> None:
        self._options = options
        self._folder = folder
        self._url = url
        self._postmaster = postmaster
        self._servers = servers

    async def warm_up(self) -> None:
        """Open the connections of all servers; Node also compiles what is called often."""
        for name in self._servers:
            await self._thing(name, self._single(MANY))()

    async def table(self, name: str) -> Table:
        """Return the table of this name, one of TABLES."""
        kind, _, in_flight = name.partition("-")
        if kind == "get":
            return await self._get(int(in_flight))
        return await {"batch": self._batch, "list": self._list, "export": self._export}[kind]()

    async def _get(self, in_flight: int) -> Table:
        names = [NO_OP, *self._databases()] if in_flight == SOME else self._servers
        loads = dict.fromkeys(names, self._single(in_flight))
        runs = await self._run(f"GetUser, {in_flight} in flight", loads)
        if in_flight == 1:
            return Table("get-1", "GetUser, one call at a time", "calls", RAW, runs, value="p50")
        return Table(f"get-{in_flight}", f"GetUser, {in_flight} calls in flight", "calls", NO_OP, runs)

    async def _batch(self) -> Table:
        random, ids = Random(2), range(1, self._options.rows + 1)
        batches = [BatchGetUsersRequest(ids=random.sample(ids, PAGE)) for _ in range(DIFFERENT // 10)]
        load = self._load("BatchGetUsers", batches, SOME, rows=PAGE)
        runs = await self._run(
            "BatchGetUsers", dict.fromkeys(self._databases(), load) | {SINGLE: self._single(MANY)}
        )
        title = f"BatchGetUsers of {PAGE}, {SOME} calls in flight"
        return Table("batch", title, "users", SINGLE, runs)

    async def _list(self) -> Table:
        loads = {name: self._pages(name, 0) for name in self._databases()}
        loads[DEEP] = self._pages(ROSTER, self._options.rows * 4 // 5)
        runs = await self._run("ListUsers", loads)
        title = f"ListUsers, pages of {PAGE}, {SOME} calls in flight"
        return Table("list", title, "users", TEXTBOOK, runs)

    async def _export(self) -> Table:
        rows = min(self._options.rows, self._options.exported)
        after = self._options.rows - rows
        request = [ExportUsersRequest(after_id=after)]
        load = self._load("ExportUsers", request, 1, rows=rows, calls=1)
        things: dict[str, Thing] = {}
        for name in self._databases():
            await asyncio.to_thread(_check_export, self._servers[name].address, request[0], rows)
            things[name] = self._thing(name, load)
        for name in (COPY, COPY_AGAIN):
            things[name] = partial(
                asyncio.to_thread, copy_to, self._url, COPY_TO.format(after=after), rows, self._postmaster
            )
        runs = await take_turns("ExportUsers", things, self._options.rounds)
        return Table("export", f"ExportUsers of {rows:,} users", "rows", COPY, runs)

    def _databases(self) -> list[str]:
        """Return the servers that read many users from PostgreSQL: one of each kind, and Roster twice."""
        return [name for name in (ROSTER, AGAIN, GO, NODE, RAW, TEXTBOOK) if name in self._servers]

    def _single(self, in_flight: int) -> Load:
        random = Random(1)
        requests = [GetUserRequest(id=random.randint(1, self._options.rows)) for _ in range(DIFFERENT)]
        return self._load("GetUser", requests, in_flight)

    def _pages(self, name: str, depth: int) -> Load:
        """Return calls for the next pages after some rows; a server understands its own tokens only."""
        with grpc.insecure_channel(self._servers[name].address) as channel:
            users = UserServiceStub(channel)
            token = ""
            for _ in range(depth // 1000):
                token = users.ListUsers(ListUsersRequest(page_size=1000, page_token=token)).next_page_token
            tokens = [token]
            for _ in range(50):
                page = users.ListUsers(ListUsersRequest(page_size=PAGE, page_token=tokens[-1]))
                tokens.append(page.next_page_token)
        requests = [ListUsersRequest(page_size=PAGE, page_token=token) for token in tokens]
        return self._load("ListUsers", requests, SOME, rows=PAGE, name=f"{name} {depth}")

    def _load(
        self,
        method: str,
        requests: list[Any],
        in_flight: int,
        *,
        rows: int = 1,
        calls: int = 0,
        name: str = "",
    ) -> Load:
        path = write_requests(self._folder / f"{method} {name}", requests)
        seconds = 0 if calls else self._options.seconds
        return Load(f"UserService/{method}", path, in_flight, seconds, calls, rows)

    async def _run(self, title: str, loads: Mapping[str, Load]) -> dict[str, list[Run]]:
        things = {name: self._thing(name, load) for name, load in loads.items()}
        for thing in things.values():
            await thing()  # warm-up: statements and plans
        return await take_turns(title, things, self._options.rounds)

    def _thing(self, name: str, load: Load) -> Thing:
        server = self._servers[{SINGLE: ROSTER, DEEP: ROSTER}.get(name, name)]
        return partial(asyncio.to_thread, load.run, server.address, server.pid, self._postmaster)


def copy_to(url: str, script: str, rows: int, postmaster: int) -> Run:
    r"""Run psql's \copy to."""
    clock = Clock(postgresql=postmaster)
    subprocess.run([*PSQL, url, "--command", script], check=True)
    return clock.stop(rows)


def _check_export(address: str, request: ExportUsersRequest, rows: int) -> None:
    with grpc.insecure_channel(address) as channel:
        found = sum(len(message.users) for message in UserServiceStub(channel).ExportUsers(request))
    if found != rows:
        raise RuntimeError(f"{found} rows were exported, not {rows}")


async def run(
    options: Options, names: Iterable[str], folder: Path, postgresql: PostgreSQL
) -> AsyncIterator[Table]:
    """Yield the tables of these names."""
    users = folder / "users.txt"
    users.write_text(copy_text(make_users(options.rows)))
    async with AsyncExitStack() as stack:
        url, sqlite_url = [
            await stack.enter_async_context(
                store.database(await stack.enter_async_context(store.template(users)))
            )
            for store in (postgresql, Sqlite(folder))
        ]
        servers = {name: stack.enter_context(start_server(name, url)) for name in available(*SERVERS)}
        servers[SQLITE] = stack.enter_context(start_server(ROSTER, sqlite_url))
        reads = Reads(options, folder, url, postgresql.pid, servers)
        await reads.warm_up()
        for name in names:
            yield await reads.table(name)
