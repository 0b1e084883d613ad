"""A consumer in a process of its own, which can be killed at any time.

Its mirror is a SQLite file: the rows, and in the same transaction the token.
"""

import asyncio
import json
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc

from roster.v1.changes_pb2 import ListChangesRequest, WatchChangesRequest
from roster.v1.posts_pb2 import ExportPostsRequest
from roster.v1.users_pb2 import ExportUsersRequest
from tests.faults.changes.followers import RESETS, RETRIED, Stubs, reason_of
from tests.faults.changes.mirror import TABLES, Mirror, RowKey

SCHEMA = """
CREATE TABLE IF NOT EXISTS mirror (entity TEXT, id INTEGER, row TEXT, PRIMARY KEY (entity, id));
CREATE TABLE IF NOT EXISTS position (token TEXT);
"""
IDLE_SECONDS = 0.1
OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


class StoredMirror:
    """The mirror of the process."""

    name = "a process that is killed"

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(sqlite3.connect(path)) as file:
            file.execute("PRAGMA journal_mode = WAL")
            file.executescript(SCHEMA)

    @property
    def mirror(self) -> Mirror:
        """The rows that are stored now."""
        mirror = Mirror(TABLES.values())
        with closing(sqlite3.connect(self.path)) as file:
            for entity, id, row in file.execute("SELECT entity, id, row FROM mirror"):
                mirror.rows[entity, id] = tuple(json.loads(row))
        return mirror

    @property
    def token(self) -> str:
        """The token after these rows; empty before the first export."""
        with closing(sqlite3.connect(self.path)) as file:
            found = file.execute("SELECT token FROM position").fetchone()
            return str(found[0]) if found else ""

    def store(self, mirror: Mirror, keys: Iterable[RowKey], token: str, *, is_export: bool = False) -> None:
        """Store rows of a mirror, those that it does not have as deleted, and the token."""
        with closing(sqlite3.connect(self.path)) as file, file:
            if is_export:
                file.execute("DELETE FROM mirror")
            for key in keys:
                if key in mirror.rows:
                    values = (*key, json.dumps(mirror.rows[key]))
                    file.execute("INSERT OR REPLACE INTO mirror VALUES (?, ?, ?)", values)
                else:
                    file.execute("DELETE FROM mirror WHERE entity = ? AND id = ?", key)
            file.execute("DELETE FROM position")
            if token:
                file.execute("INSERT INTO position VALUES (?)", (token,))


async def follow(stored: StoredMirror, stubs: Stubs) -> None:
    """Follow the feed until an error ends it."""
    if not stored.token:
        token = (await stubs.changes.ListChanges(ListChangesRequest())).token
        mirror = Mirror(TABLES.values())
        async for users in stubs.users.ExportUsers(ExportUsersRequest()):
            for user in users.users:
                mirror.put_user(user)
        async for posts in stubs.posts.ExportPosts(ExportPostsRequest()):
            for post in posts.posts:
                mirror.put_post(post)
        stored.store(mirror, mirror.rows, token, is_export=True)
    async for response in stubs.changes.WatchChanges(WatchChangesRequest(token=stored.token)):
        mirror = Mirror(TABLES.values())
        stored.store(mirror, mirror.apply(response.changes), response.token)


async def follow_forever(path: Path, addresses: Sequence[str]) -> None:
    """Follow the feed on one server after the other."""
    stored = StoredMirror(path)
    while True:
        for address in addresses:
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                try:
                    await follow(stored, Stubs(channel))
                except grpc.aio.AioRpcError as error:
                    if reason_of(error) in RESETS:
                        stored.store(Mirror(()), [], "")
                    elif error.code() not in RETRIED:
                        raise
                    await asyncio.sleep(IDLE_SECONDS)


class Watcher:
    """The process, which is started again after it is killed."""

    def __init__(self, path: Path, addresses: Sequence[str]) -> None:
        self.stored = StoredMirror(path)
        self._addresses = addresses
        self._process: Any = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the process running until the end of the block."""
        await self._start()
        try:
            yield
        finally:
            await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """Kill the process, and start another one; raises AssertionError if it had failed."""
        assert self._process.returncode is None, "the watcher has failed"
        await self._end(signal.SIGKILL)
        await self._start()

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.changes.watcher", str(self.stored.path), *self._addresses
        )

    async def _end(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)
        await self._process.wait()


if __name__ == "__main__":
    asyncio.run(follow_forever(Path(sys.argv[1]), sys.argv[2:]))
