"""A bulk load through crashes, and a check of every row afterwards.

A history is plain data, so that one that fails can be saved as JSON: the database, the rows of a message, and
the faults. Each fault follows the one before it after a number of messages and a pause.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from roster.client import BulkLoader, LoadInterrupted, channel
from roster.v1.bulk_pb2 import (
    BulkAck,
    BulkLoad,
    BulkOptions,
    GetBulkLoadRequest,
    ListBulkLoadFailuresRequest,
    RowFailure,
)
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.db import migrations
from tests.faults.histories import save_if_failed
from tests.support.postgres import PostgresServer
from tests.support.rival import Rival, rival, until

ANY_DATABASE = (
    "kill the server",
    "die before commit",
    "die after commit",
    "lose the answer",
    "begin again",
    "load twice",
)
POSTGRESQL = (
    "crash PostgreSQL",
    "terminate any backend",
    "terminate while it copies",
    "terminate before commit",
)
LOAD_ID = "crashes"
LONGEST_PAUSE_SECONDS = 0.1
FIRST_RETRY_SECONDS = 0.05
DEADLINE_SECONDS = 110
LOG_CHARACTERS = 20_000
INSERT = "INSERT INTO users (email) VALUES ($1) ON CONFLICT DO NOTHING RETURNING id"
TERMINATE_ANY = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name LIKE 'roster%' AND datname = current_database() ORDER BY random() LIMIT 1
"""


def draw_history(random: Random, database: str) -> dict[str, Any]:
    """Return a random history with every kind of fault once."""
    kinds = [*ANY_DATABASE, *(POSTGRESQL if database == "postgresql" else ())]
    random.shuffle(kinds)
    faults = [
        [random.randint(1, 6), round(random.uniform(0, LONGEST_PAUSE_SECONDS), 3), kind] for kind in kinds
    ]
    return {"database": database, "batch_rows": random.choice([1, 30, 300]), "faults": faults}


async def replay(history: dict[str, Any], postgres: PostgresServer, folder: Path) -> None:
    """Run a history on a new database; a history that fails is saved."""
    log = folder / "log"
    with save_if_failed("crash", history):
        try:
            if history["database"] == "sqlite":
                await Trial(history, f"sqlite:///{folder}/roster.db", log, postgres).run()
                return
            async with postgres.database() as url:
                await asyncio.to_thread(migrations.upgrade, url)
                await Trial(history, url, log, postgres).run()
        except Exception as error:
            error.add_note(f"The server's log ends with:\n{log.read_text()[-LOG_CHARACTERS:]}")
            raise


class File:
    """Rows to load: some are invalid, and some have the e-mail of an earlier row."""

    def __init__(self) -> None:
        self.size: int | None = None
        self.read = 0  # by the loader that has read most

    async def rows(self) -> AsyncIterator[User]:
        """Yield the rows from the first one on."""
        number = 0
        while self.size is None or number < self.size:
            self.read = max(self.read, number + 1)
            yield self.row(number)
            number += 1

    def end(self) -> None:
        """End after the last row that a loader has read."""
        self.size = self.read

    @staticmethod
    def row(number: int) -> User:
        """Return a row by its number."""
        name = {7: f"no user {number}", 17: f"user{number // 2}"}.get(number % 20, f"user{number}")
        return User(email=f"{name}@example.org", full_name=f"Row {number}")


class Ledger:
    """The outcomes that the loaders received: id, reason, and id of the row that owns the key."""

    def __init__(self) -> None:
        self.outcomes: dict[int, tuple[int, str, int]] = {}
        self.failures: dict[int, RowFailure] = {}
        self.messages = 0  # messages with rows that were not acknowledged before
        self.changed = asyncio.Condition()

    async def note(self, ack: BulkAck) -> None:
        """Record an ack; a row that is acknowledged again must have the same outcome."""
        failures = {failure.offset: failure for failure in ack.failures}
        is_new = ack.offset + len(ack.ids) - 1 not in self.outcomes
        for offset, id in enumerate(ack.ids, ack.offset):
            failure = failures.get(offset, RowFailure())
            outcome = (id, failure.reason, failure.existing_id)
            assert self.outcomes.setdefault(offset, outcome) == outcome
        for offset, failure in failures.items():
            assert self.failures.setdefault(offset, failure) == failure
        async with self.changed:
            self.messages += is_new
            self.changed.notify_all()

    async def wait_for(self, messages: int) -> None:
        """Wait for this many more messages with new rows."""
        end = self.messages + messages
        async with self.changed:
            await self.changed.wait_for(lambda: self.messages >= end)


class MortalServer:
    """A server in its own process, which is restarted whenever it dies."""

    def __init__(self, url: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.log = log
        self._environment = {**os.environ, "ROSTER_DATABASE_URL": url, "ROSTER_LISTEN": self.address}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the server running."""
        await self._start()
        restarting = asyncio.create_task(self._restart_forever())
        try:
            yield
        finally:
            restarting.cancel()
            await asyncio.gather(restarting, return_exceptions=True)
            self._process.kill()
            await self._process.wait()

    async def kill(self) -> None:
        """Kill the server."""
        process = self._process
        process.kill()
        await process.wait()

    def order(self, fault: str) -> "asyncio.subprocess.Process":
        """Let the server fail at its next commit in this way."""
        assert self._process.stdin
        self._process.stdin.write(f"{fault}\n".encode())
        return self._process

    async def _restart_forever(self) -> None:
        while True:
            await self._process.wait()
            await self._start()

    async def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "tests.faults.mortal"),
                env=self._environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
            )


class Trial:
    """Runs a history: loaders at work, and faults."""

    def __init__(self, history: dict[str, Any], url: str, log: Path, postgres: PostgresServer) -> None:
        self.history = history
        self.url = url
        self.postgres = postgres
        self.server = MortalServer(url, log)
        self.file = File()
        self.ledger = Ledger()
        self.loaders: list[asyncio.Task[None]] = []
        self.fenced = asyncio.Semaphore(0)

    async def run(self) -> None:
        """Load through all faults, then check each row; raises AssertionError."""
        async with asyncio.timeout(DEADLINE_SECONDS), self.server.running():
            async with asyncio.TaskGroup() as self.tasks:
                self._begin(self.history["batch_rows"])
                for messages, pause, kind in self.history["faults"]:
                    await self.ledger.wait_for(messages)
                    await asyncio.sleep(pause)
                    await self._inject(kind)
                self.file.end()
            await self._load(batch_rows=1000)  # replays the outcomes of all rows
            await self._check()

    def _begin(self, batch_rows: int) -> None:
        self.loaders.append(self.tasks.create_task(self._load(batch_rows)))

    async def _load(self, batch_rows: int) -> None:
        async with channel(self.server.address) as connection:
            await connection.channel_ready()
            loader = BulkLoader(
                UserServiceStub(connection).BulkCreateUsers,
                BulkCreateUsersRequest,
                BulkOptions(load_id=LOAD_ID, return_ids=True),
                batch_rows=batch_rows,
                first_pause_seconds=FIRST_RETRY_SECONDS,
            )
            try:
                async with aclosing(loader.run(self.file.rows())) as events:
                    async for event in events:
                        if isinstance(event, BulkAck):
                            await self.ledger.note(event)
            except LoadInterrupted as interrupted:
                if interrupted.reason != "LOAD_FENCED":
                    raise
                self.fenced.release()

    async def _inject(self, kind: str) -> None:
        if kind == "kill the server":
            await self.server.kill()
        elif kind.startswith("die"):
            await self.server.order(kind).wait()
        elif kind in ("lose the answer", "terminate before commit"):
            self.server.order(kind)
        elif kind in ("begin again", "load twice"):
            await self._begin_another(kind)
        elif kind == "crash PostgreSQL":
            await asyncio.to_thread(self.postgres.stop, "immediate")
            await asyncio.to_thread(self.postgres.start)
        else:
            await self._terminate(kind)

    async def _begin_another(self, kind: str) -> None:
        first = self.loaders.pop()
        self._begin(self.history["batch_rows"] * 2 + 1)
        if kind == "begin again":
            first.cancel()
        else:
            await self.fenced.acquire()

    async def _terminate(self, kind: str) -> None:
        async with rival(self.url) as other:
            if kind == "terminate any backend":
                await other.execute(TERMINATE_ANY)
                return
            await until(lambda: self._insert_ahead(other))
            await other.execute(f"SELECT pg_terminate_backend({await other.wait_for_blocked()})")
            await other.rollback()

    async def _insert_ahead(self, other: Rival) -> bool:
        """Insert a row that the loader has not read yet; return whether that succeeded."""
        ahead = self.file.read + 20 - self.file.read % 20  # neither invalid nor a duplicate
        return await other.connection.fetchval(INSERT, self.file.row(ahead).email) is not None

    async def _check(self) -> None:
        """Compare the outcomes that the loaders received with the stored rows."""
        async with channel(self.server.address) as connection:
            users = await _users(UserServiceStub(connection))
            loads = BulkServiceStub(connection)
            load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
            failures = await _failures(loads)
        first: dict[str, str] = {}
        for number in range(self.file.read):
            row = self.file.row(number)
            assert self.ledger.outcomes[number] == _expected(row, users, is_new=row.email not in first)
            first.setdefault(row.email, row.full_name)
        assert {email: user.full_name for email, user in users.items()} == {
            email: name for email, name in first.items() if " " not in email
        }
        assert failures == [failure for _, failure in sorted(self.ledger.failures.items())]
        counts = (load.next_offset, load.created, load.updated, load.skipped, load.failed)
        assert (load.state, *counts) == (
            BulkLoad.FINISHED,
            self.file.read,
            len(users),
            0,
            0,
            len(failures),
        )


def _expected(row: User, users: dict[str, User], *, is_new: bool) -> tuple[int, str, int]:
    if " " in row.email:
        return 0, "INVALID_FIELD", 0
    id = users[row.email].id
    return (id, "", 0) if is_new else (0, "EMAIL_TAKEN", id)


async def _users(users: UserServiceAsyncStub) -> dict[str, User]:
    found: dict[str, User] = {}
    request = ListUsersRequest(page_size=1000)
    while True:
        page = await users.ListUsers(request)
        found.update((user.email, user) for user in page.users)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def _failures(loads: BulkServiceAsyncStub) -> list[RowFailure]:
    found: list[RowFailure] = []
    request = ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_size=1000)
    while True:
        page = await loads.ListBulkLoadFailures(request)
        found += page.failures
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token
