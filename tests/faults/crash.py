"""A load through crashes of everything around it, and an account of what became of each row.

A history is plain data, so that one that failed can be kept as JSON: the database, how many rows a message
has, and faults, each so many messages and then a pause behind the one before.
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

from roster.v1.bulk_pb2 import (
    BulkAck,
    BulkLoad,
    BulkOptions,
    GetBulkLoadRequest,
    ListBulkLoadFailuresRequest,
    RowFailure,
)
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.client import BulkLoader, LoadInterrupted, channel
from service.db import migrations
from tests.faults.histories import keeping
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
TAKE = "INSERT INTO users (email) VALUES ($1) ON CONFLICT DO NOTHING RETURNING id"
TERMINATE_ANY = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name LIKE 'roster%' AND datname = current_database() ORDER BY random() LIMIT 1
"""


def drawn(random: Random, database: str) -> dict[str, Any]:
    """Return a history with all kinds of faults."""
    kinds = [*ANY_DATABASE, *(POSTGRESQL if database == "postgresql" else ())]
    random.shuffle(kinds)
    faults = [
        [random.randint(1, 6), round(random.uniform(0, LONGEST_PAUSE_SECONDS), 3), kind] for kind in kinds
    ]
    return {"database": database, "batch_rows": random.choice([1, 30, 300]), "faults": faults}


async def replay(history: dict[str, Any], postgres: PostgresServer, folder: Path) -> None:
    """Let a history happen in a new database; one that fails is kept."""
    log = folder / "log"
    with keeping("crash", history):
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
    """Rows to load, of which some are bad, and some have the e-mail of one before; it ends when told so."""

    def __init__(self) -> None:
        self.size: int | None = None
        self.read = 0  # by whoever read most

    async def rows(self) -> AsyncIterator[User]:
        """Return the rows from the first on."""
        number = 0
        while self.size is None or number < self.size:
            self.read = max(self.read, number + 1)
            yield self.row(number)
            number += 1

    def end(self) -> None:
        """Have no more rows than somebody has read already."""
        self.size = self.read

    @staticmethod
    def row(number: int) -> User:
        """Return a row."""
        name = {7: f"no user {number}", 17: f"user{number // 2}"}.get(number % 20, f"user{number}")
        return User(email=f"{name}@example.org", full_name=f"Row {number}")


class Ledger:
    """What loaders were told of the rows: id, reason, id of the row that has the key."""

    def __init__(self) -> None:
        self.told: dict[int, tuple[int, str, int]] = {}
        self.failures: dict[int, RowFailure] = {}
        self.messages = 0  # those with rows that nobody was told of before
        self.grown = asyncio.Condition()

    async def note(self, ack: BulkAck) -> None:
        """Take in an ack; what is told again is told alike."""
        failures = {failure.offset: failure for failure in ack.failures}
        is_new = ack.offset + len(ack.ids) - 1 not in self.told
        for offset, id in enumerate(ack.ids, ack.offset):
            failure = failures.get(offset, RowFailure())
            told = (id, failure.reason, failure.existing_id)
            assert self.told.setdefault(offset, told) == told
        for offset, failure in failures.items():
            assert self.failures.setdefault(offset, failure) == failure
        async with self.grown:
            self.messages += is_new
            self.grown.notify_all()

    async def grows(self, messages: int) -> None:
        """Wait for so many more messages."""
        end = self.messages + messages
        async with self.grown:
            await self.grown.wait_for(lambda: self.messages >= end)


class MortalServer:
    """A server in a process of its own, which is started again whenever it dies."""

    def __init__(self, url: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.log = log
        self._environment = {**os.environ, "ROSTER_DATABASE_URL": url, "ROSTER_LISTEN": self.address}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep it alive."""
        await self._start()
        keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            self._process.kill()
            await self._process.wait()

    async def killed(self) -> None:
        """Kill it."""
        process = self._process
        process.kill()
        await process.wait()

    def order(self, accident: str) -> "asyncio.subprocess.Process":
        """Let it have an accident at its next commit."""
        assert self._process.stdin
        self._process.stdin.write(f"{accident}\n".encode())
        return self._process

    async def _keep(self) -> None:
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
    """A history as it happens: loaders at work, and faults."""

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
        """Load through all faults, and account for each row; raises AssertionError."""
        async with asyncio.timeout(DEADLINE_SECONDS), self.server.running():
            async with asyncio.TaskGroup() as self.tasks:
                self._begin(self.history["batch_rows"])
                for messages, pause, kind in self.history["faults"]:
                    await self.ledger.grows(messages)
                    await asyncio.sleep(pause)
                    await self._inject(kind)
                self.file.end()
            await self._load(batch_rows=1000)  # all rows once more, with their first outcome
            await self._account()

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
            await self.server.killed()
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
            await until(lambda: self._is_ahead(other))
            await other.execute(f"SELECT pg_terminate_backend({await other.waiting()})")
            await other.rollback()

    async def _is_ahead(self, other: Rival) -> bool:
        """Let the other session take a row before the loader does, and tell whether that went well."""
        ahead = self.file.read + 20 - self.file.read % 20  # neither bad nor like another
        return await other.connection.fetchval(TAKE, self.file.row(ahead).email) is not None

    async def _account(self) -> None:
        """Compare what loaders were told of each row with what is there."""
        async with channel(self.server.address) as connection:
            users = await _users(UserServiceStub(connection))
            loads = BulkServiceStub(connection)
            load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
            failures = await _failures(loads)
        first: dict[str, str] = {}
        for number in range(self.file.read):
            row = self.file.row(number)
            assert self.ledger.told[number] == _expected(row, users, is_new=row.email not in first)
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


async def _users(users: UserServiceStub) -> dict[str, User]:
    found: dict[str, User] = {}
    request = ListUsersRequest(page_size=1000)
    while True:
        page = await users.ListUsers(request)
        found.update((user.email, user) for user in page.users)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def _failures(loads: BulkServiceStub) -> list[RowFailure]:
    found: list[RowFailure] = []
    request = ListBulkLoadFailuresRequest(load_id=LOAD_ID, page_size=1000)
    while True:
        page = await loads.ListBulkLoadFailures(request)
        found += page.failures
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token
