"""Callers, a named load and an export through a failover of PostgreSQL, and a check of every row afterwards.

The callers use stubs without retries, and repeat each call themselves until it is answered: so every error
that the server gives is seen. The load and the export have their default settings.
"""

import asyncio
import json
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol
from uuid import UUID

import grpc
from google.rpc.error_details_pb2 import ErrorInfo

from roster.client import BulkLoader, channel
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOptions, GetBulkLoadRequest
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    GetUserRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import conninfo, migrations
from service.db.connect import connect
from tests.support.command import ROSTER, SERVER_DEFAULTS, ended, start
from tests.support.errors import Refusal
from tests.support.traffic import stored_users

Fault = Literal["kill", "stall", "cut"]

CALLERS = 32
CALL_SECONDS = 30  # longer than any failover, shorter than the statement timeout
RETRY_SECONDS = 0.05
BACK_SECONDS = 10
DEADLINE_SECONDS = 100
LOAD_ID = "failover"
BATCH_ROWS = 200
# The export takes longer than a failover: its reader is slow, and its rows are more than what is buffered.
POSTS = 3000
READ_BYTES, READ_PAUSE_SECONDS = 1 << 16, 0.01
FILL = f"""
    WITH author AS (INSERT INTO users (email, full_name) VALUES ('author@example.org', '') RETURNING id)
    INSERT INTO posts (title, content, author_id)
    SELECT 'Post ' || number, repeat(md5(number::text), 320), author.id
    FROM author, generate_series(1, {POSTS}) AS number
"""
LOG_LINES = 100


class Databases(Protocol):
    """PostgreSQL with a standby."""

    url: str

    async def fail(self, fault: Fault) -> None:
        """Kill or stall the primary."""

    async def promote(self) -> None:
        """Wait until a standby has been promoted, or promote it."""


@dataclass
class Outage:
    """The errors and times that callers saw, in seconds from the fault and from the end of the promotion."""

    fault: Fault
    promoted: float
    first_success: float
    all_succeed: float
    errors: dict[str, int]

    def __str__(self) -> str:
        seen = ", ".join(f"{number} {error}" for error, number in sorted(self.errors.items()))
        return (
            f"{self.fault}: promoted after {self.promoted:.1f} s; first success {self.first_success:.1f} s, "
            f"all callers {self.all_succeed:.1f} s after that; errors: {seen or 'none'}"
        )


class Trial:
    """A failover at a random moment, under traffic."""

    def __init__(self, databases: Databases, folder: Path, seed: int, fault: Fault) -> None:
        self._databases = databases
        self._folder = folder
        self._random = Random(seed)
        self._fault = fault
        self._is_over = asyncio.Event()
        self.users: dict[str, User] = {}  # as acknowledged last, by e-mail
        self.loaded: dict[int, int] = {}  # ids by offset
        self.read = 0  # rows of the load
        self.errors: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self._successes: list[tuple[float, float]] = []  # when the calls began, and when they succeeded
        self._began: dict[int, float] = {}  # when the last successful call began, by caller
        self._changed = asyncio.Condition()

    async def run(self) -> Outage:
        """Serve, call, fail over, and check; raises AssertionError."""
        await asyncio.to_thread(migrations.upgrade, self._databases.url)
        await self._fill()
        async with asyncio.timeout(DEADLINE_SECONDS), self._serving() as address:
            async with asyncio.TaskGroup() as tasks:
                for number in range(CALLERS):
                    tasks.create_task(self._call(number, address))
                tasks.create_task(self._load(address))
                export = tasks.create_task(self._export(address))
                outage = await self._fail_over()
                self._is_over.set()
            await self._check(address, export.result())
        return outage

    async def _fill(self) -> None:
        connection = await connect(conninfo.read(self._databases.url, {}))
        await connection.execute(FILL)
        await connection.close()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[str]:
        """Run a server, which must not end before the end of the block."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        settings = {
            "ROSTER_DATABASE_URL": self._databases.url,
            "ROSTER_LISTEN": address,
            "ROSTER_LOG_LEVEL": "WARNING",
        }
        log = self._folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                ROSTER,
                "serve",
                env={**os.environ, **SERVER_DEFAULTS, **settings},
                stdout=output,
                stderr=output,
            )
        try:
            yield address
            assert process.returncode is None, "the server has ended"
        except BaseException as error:
            lines = [line for line in log.read_text().splitlines() if "roster.audit" not in line]
            error.add_note("\n".join(["The server's log ends with:", *lines[-LOG_LINES:]]))
            raise
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _fail_over(self) -> Outage:
        await self._wait_until(lambda: self._acks() > self._random.randint(100, 600))
        await asyncio.sleep(self._random.uniform(0, 0.5))
        before = time.monotonic()
        await self._databases.fail(self._fault)
        failed = time.monotonic()
        await self._databases.promote()
        promoted = time.monotonic()
        # The old primary answers no call that began after the fault.
        await self._wait_until(lambda: min(self._began.values()) > failed)
        successes = [ended for began, ended in self._successes if began > failed]
        return Outage(
            self._fault,
            promoted=promoted - before,
            first_success=max(min(successes) - promoted, 0),
            all_succeed=time.monotonic() - promoted,
            errors=dict(self.errors),
        )

    def _acks(self) -> int:
        return sum(user.version for user in self.users.values())

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _call(self, caller: int, address: str) -> None:
        """Create users one after the other; read and change each, and read it again."""
        random = Random(self._random.random())
        async with grpc.aio.insecure_channel(address) as connection:
            await connection.channel_ready()
            stub = UserServiceStub(connection)
            number = 0
            while not self._is_over.is_set():
                email = f"call{caller}-{number}@example.org"
                number += 1

                async def answer(method: Callable[..., Awaitable[User]], request: Any) -> User:
                    user = await self._answer(caller, method, request)
                    self.users[user.email] = user
                    return user

                create = CreateUserRequest(user=User(email=email), request_id=_uuid(random))
                created = await answer(stub.CreateUser, create)
                read = GetUserRequest(email=email)
                assert await self._answer(caller, stub.GetUser, read) == created
                change = User(id=created.id, version=1, full_name="Changed")
                changed = await answer(
                    stub.UpdateUser, UpdateUserRequest(user=change, request_id=_uuid(random))
                )
                assert (changed.full_name, changed.version) == ("Changed", 2)
                assert await self._answer(caller, stub.GetUser, read) == changed

    async def _answer(self, caller: int, method: Callable[..., Awaitable[User]], request: Any) -> User:
        """Repeat a call until it is answered."""
        while True:
            began = time.monotonic()
            try:
                user = await method(request, timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                self._judge(Refusal(error))
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await self._note(caller, began)
                return user

    async def _note(self, caller: int, began: float) -> None:
        self._successes.append((began, time.monotonic()))
        self._began[caller] = began
        async with self._changed:
            self._changed.notify_all()

    def _judge(self, refusal: Refusal) -> None:
        info = refusal.detail(ErrorInfo)
        reason = info.reason if info else ""
        is_retryable = refusal.code is grpc.StatusCode.UNAVAILABLE and refusal.retry_seconds is not None
        self.errors[f"{refusal.code.name}/{reason}"] += 1
        if not (is_retryable or reason == "OUTCOME_UNKNOWN"):
            self.unexpected.append(f"{refusal.code.name}/{reason}: {refusal.message}")

    async def _load(self, address: str) -> None:
        async with channel(address) as connection:
            await connection.channel_ready()
            loader = BulkLoader(
                UserServiceStub(connection).BulkCreateUsers,
                BulkCreateUsersRequest,
                BulkOptions(load_id=LOAD_ID, return_ids=True),
                batch_rows=BATCH_ROWS,
            )
            async with aclosing(loader.run(self._rows())) as events:
                async for event in events:
                    if isinstance(event, BulkAck):
                        for offset, id in enumerate(event.ids, event.offset):
                            assert self.loaded.setdefault(offset, id) == id

    async def _rows(self) -> AsyncIterator[User]:
        while not self._is_over.is_set():
            yield User(email=f"row{self.read}@example.org")
            self.read += 1
            if self.read % BATCH_ROWS == 0:
                await asyncio.sleep(RETRY_SECONDS)

    async def _export(self, address: str) -> list[int]:
        """Export all posts to a slow reader; return their ids."""
        async with channel(address) as connection:
            await connection.channel_ready()
        process = await start(ROSTER, "export", "posts", folder=self._folder, ROSTER_ADDRESS=address)
        assert process.stdout
        received = b""
        while part := await process.stdout.read(READ_BYTES):
            received += part
            await asyncio.sleep(READ_PAUSE_SECONDS)
        done = await ended(process)
        assert done.status == 0, done.err
        return [json.loads(line)["id"] for line in received.splitlines()]

    async def _check(self, address: str, exported: list[int]) -> None:
        """Compare what was acknowledged with what is stored."""
        assert self.unexpected == []
        stored = await stored_users(address)
        del stored["author@example.org"]
        rows = {email: user for email, user in stored.items() if email.startswith("row")}
        assert {email: user for email, user in stored.items() if email not in rows} == self.users
        assert {f"row{offset}@example.org": id for offset, id in self.loaded.items()} == {
            email: user.id for email, user in rows.items()
        }
        assert {user.version for user in rows.values()} == {1}
        async with channel(address) as connection:
            load = await BulkServiceStub(connection).GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
        assert (load.state, load.created, load.failed) == (BulkLoad.FINISHED, self.read, 0)
        assert exported == list(range(1, POSTS + 1))


def _uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))
