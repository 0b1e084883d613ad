"""The change feed: what the log costs writers, what watchers cost the server, and how late changes arrive."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

from bench.bulk import measure
from bench.cases import Cases
from bench.databases import PostgreSQL, execute
from bench.load import Load, write_requests
from bench.measure import Clock, Run, Thing, ask, expect, start_process, take_turns
from bench.options import Options
from bench.report import Table
from bench.rows import copy_text, make_users
from bench.servers import ROSTER, start_server
from bench.watching import current_token
from roster.v1.users_pb2 import UpdateUserRequest

TABLES = ("log-bulk", "log-calls", "watchers", "latency", "catch-up")
WITH, WITHOUT = "with the log", "without the log"
WITHOUT_LOG = ("ALTER TABLE users DISABLE TRIGGER USER", "ALTER TABLE posts DISABLE TRIGGER USER")
WATCHERS = (0, 1, 1000)
IDLE_SECONDS = 10
SETTLE_SECONDS = 1
CHANGES = 200
REWRITE = "UPDATE users SET version = version + 1"


class ChangeRuns:
    """Runs the benchmarks of the feed."""

    def __init__(self, options: Options, folder: Path, postgresql: PostgreSQL, stack: AsyncExitStack) -> None:
        self._options = options
        self._folder = folder
        self._postgresql = postgresql
        self._stack = stack

    async def log_bulk(self) -> Table:
        """Compare a bulk create with and without the triggers that write the log."""
        case = Cases(self._folder, self._options.rows, "bench").case("create")
        template = await self._template(None)

        async def load(*statements: str) -> Run:
            async with self._postgresql.database(template) as url:
                await execute(url, *statements)
                return await asyncio.to_thread(measure, case.approach, ROSTER, url, self._postgresql.pid)

        things: dict[str, Thing] = {WITH: load, WITHOUT: partial(load, *WITHOUT_LOG)}
        runs = await take_turns("log-bulk", things, self._options.rounds)
        return Table("log-bulk", f"BulkCreateUsers, {case.result:,} users", "rows", WITHOUT, runs)

    async def log_calls(self) -> Table:
        """Compare single updates with and without the triggers."""
        template = await self._template(self._users())
        calls = [UpdateUserRequest(user={"id": id, "full_name": "Ada"}) for id in range(1, 5001)]
        path = write_requests(self._folder / "updates.requests", calls)
        load = Load("UserService/UpdateUser", path, 1, self._options.seconds)
        things: dict[str, Thing] = {}
        for name, statements in ((WITH, ()), (WITHOUT, WITHOUT_LOG)):
            url = await self._stack.enter_async_context(self._postgresql.database(template))
            await execute(url, *statements)
            server = self._stack.enter_context(start_server(ROSTER, url))
            things[name] = partial(
                asyncio.to_thread, load.run, server.address, server.pid, self._postgresql.pid
            )
            await things[name]()  # warm-up
        runs = await take_turns("log-calls", things, self._options.rounds)
        return Table("log-calls", "UpdateUser, one at a time", "calls", WITHOUT, runs, value="p50")

    async def watchers(self) -> Table:
        """Measure the CPU that idle watchers take: a call is a second here."""
        template = await self._template(None)
        url = await self._stack.enter_async_context(self._postgresql.database(template))
        server = self._stack.enter_context(start_server(ROSTER, url))

        def idle(watchers: int) -> Run:
            with ExitStack() as processes:
                if watchers:
                    command = ("idle", str(watchers), str(2 * IDLE_SECONDS), server.address)
                    client = processes.enter_context(_worker(*command))
                    ask(client, "\n")  # until it watches
                sleep(SETTLE_SECONDS)
                clock = Clock(server=server.pid, postgresql=self._postgresql.pid)
                sleep(IDLE_SECONDS)
                return clock.stop(IDLE_SECONDS)

        things: dict[str, Thing] = {
            f"{watchers:,} watchers": partial(asyncio.to_thread, idle, watchers) for watchers in WATCHERS
        }
        runs = await take_turns("watchers", things, self._options.rounds)
        return Table("watchers", "Idle watchers, CPU in each second", "seconds", "", runs)

    async def latency(self) -> Table:
        """Measure the time from a commit to a watcher."""
        template = await self._template(self._users())
        url = await self._stack.enter_async_context(self._postgresql.database(template))
        server = self._stack.enter_context(start_server(ROSTER, url))

        def change() -> Run:
            with _worker("latency", url, str(CHANGES), server.address) as client:
                clock = Clock(server=server.pid, postgresql=self._postgresql.pid)
                times = json.loads(ask(client, "\n"))
                return clock.stop(CHANGES, **times)

        runs = await take_turns(
            "latency", {"a watcher": partial(asyncio.to_thread, change)}, self._options.rounds
        )
        return Table("latency", "From a commit to a watcher", "changes", "", runs, value="p50")

    async def catch_up(self) -> Table:
        """Measure how fast a watcher gets the changes of a whole table."""
        template = await self._template(self._users())
        url = await self._stack.enter_async_context(self._postgresql.database(template))
        server = self._stack.enter_context(start_server(ROSTER, url))
        file = self._folder / "token"
        file.write_text(await asyncio.to_thread(current_token, server.address))
        await execute(url, REWRITE)

        def catch_up() -> Run:
            rows = self._options.rows
            with _worker("catch_up", str(file), str(rows), server.address) as client:
                clock = Clock(server=server.pid, postgresql=self._postgresql.pid, client=client.pid)
                ask(client, "\n")
                return clock.stop(rows)

        runs = await take_turns(
            "catch-up", {"a watcher": partial(asyncio.to_thread, catch_up)}, self._options.rounds
        )
        return Table("catch-up", f"A watcher reads {self._options.rows:,} changes", "changes", "", runs)

    def _users(self) -> Path:
        users = self._folder / "users.txt"
        users.write_text(copy_text(make_users(self._options.rows)))
        return users

    async def _template(self, users: Path | None) -> str:
        return await self._stack.enter_async_context(self._postgresql.template(users))


@contextmanager
def _worker(*command: str) -> Iterator[Any]:
    """Start a worker, and wait until it is ready."""
    with start_process(sys.executable, "-m", "bench.worker", *command) as client:
        expect("ready", client, "")
        yield client


async def run(
    options: Options, names: Iterable[str], folder: Path, postgresql: PostgreSQL
) -> AsyncIterator[Table]:
    """Yield the tables of these names."""
    for name in names:
        async with AsyncExitStack() as stack:
            runs = ChangeRuns(options, folder, postgresql, stack)
            yield await getattr(runs, name.replace("-", "_"))()
