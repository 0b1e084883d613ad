"""Follow the change feed with a cache, a search index or a mirror of the users.

    python consumer.py cache|index|mirror ADDRESS FILE

It reads ids, or words for the index, one on each line, and prints what it has for each. Kill it at any time
and run it again: the index and the mirror continue where they were.
"""

import asyncio
import sqlite3
import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

from roster.client import Backoff, FeedReset, RosterError, TokenExpired, UserNotFound, channel, watch_changes
from roster.v1.changes_pb2 import Change, WatchChangesResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import ExportUsersRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub


class Store(ABC):
    """A copy of the users in SQLite. No transaction stores rows without the token that belongs to them."""

    schema: str

    def __init__(self, path: str, users: UserServiceAsyncStub) -> None:
        self.users = users
        self.db = sqlite3.connect(path)
        self.db.executescript(
            f"CREATE TABLE IF NOT EXISTS feed (id INTEGER PRIMARY KEY, token); {self.schema}"
        )

    @abstractmethod
    def put(self, user: User) -> None: ...

    @abstractmethod
    def delete(self, id: int) -> None: ...

    @abstractmethod
    def delete_all(self) -> None: ...

    @abstractmethod
    async def ask(self, question: str) -> str: ...

    async def begin(self) -> str:
        """Return the stored token; without one, copy all users first."""
        if row := self.db.execute("SELECT token FROM feed").fetchone():
            return str(row[0])
        token = ""
        with self.db:
            self.delete_all()
            async for response in self.users.ExportUsers(ExportUsersRequest()):
                token = token or response.watch_token  # of the first message
                for user in response.users:
                    self.put(user)
            if not token:  # it would mean now, and changes since the export would be missing
                raise RuntimeError("the server has no change feed: its exports have no watch_token")
            self.db.execute("REPLACE INTO feed VALUES (1, ?)", [token])
        return token

    def apply(self, response: WatchChangesResponse) -> None:
        """Apply changes in the order received, and store the token, in one transaction."""
        with self.db:
            for change in response.changes:
                if change.HasField("user"):
                    self.put(change.user)
                else:
                    self.delete(change.deleted_user_id)
            self.db.execute("REPLACE INTO feed VALUES (1, ?)", [response.token])

    def clear(self) -> None:
        """Forget the token: the next beginning is an export."""
        with self.db:
            self.db.execute("DELETE FROM feed")


class Mirror(Store):
    """All users. The id is the only key, because two users can trade their e-mails."""

    schema = "CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, email, full_name)"

    def put(self, user: User) -> None:
        self.db.execute("REPLACE INTO users VALUES (?, ?, ?)", [user.id, user.email, user.full_name])

    def delete(self, id: int) -> None:
        self.db.execute("DELETE FROM users WHERE id = ?", [id])

    def delete_all(self) -> None:
        self.db.execute("DELETE FROM users")

    async def ask(self, question: str) -> str:
        found = self.db.execute("SELECT full_name FROM users WHERE id = ?", [int(question)]).fetchone()
        return found[0] if found else "-"


class Index(Store):
    """The names of users, by word, in SQLite's full-text index."""

    schema = "CREATE VIRTUAL TABLE IF NOT EXISTS names USING fts5 (full_name)"

    def put(self, user: User) -> None:
        self.db.execute("REPLACE INTO names (rowid, full_name) VALUES (?, ?)", [user.id, user.full_name])

    def delete(self, id: int) -> None:
        self.db.execute("DELETE FROM names WHERE rowid = ?", [id])

    def delete_all(self) -> None:
        self.db.execute("DELETE FROM names")

    async def ask(self, question: str) -> str:
        quoted = '"' + question.replace('"', '""') + '"'
        found = self.db.execute("SELECT rowid FROM names WHERE names MATCH ? ORDER BY rowid", [quoted])
        return " ".join(str(id) for [id] in found) or "-"


class Cache:
    """Users that were read before, in memory. A change drops its user; the next question reads it again."""

    fresh_seconds = 30.0  # the server sends a response every 10 s

    def __init__(self, users: UserServiceAsyncStub) -> None:
        self.users = users
        self.clear()

    async def begin(self) -> str:
        """Return the last token, "" to begin now: a cache that is empty has missed nothing."""
        return self.token

    def apply(self, response: WatchChangesResponse) -> None:
        for change in response.changes:
            id = change.user.id or change.deleted_user_id
            self.names.pop(id, None)
            self.reads.pop(id, None)  # its result may be older than this change
        self.token, self.heard_at = response.token, time.monotonic()

    def clear(self) -> None:
        self.token, self.heard_at = "", -self.fresh_seconds
        self.names: dict[int, str] = {}
        self.reads: dict[int, object] = {}

    async def ask(self, question: str) -> str:
        id, read = int(question), object()
        # Without responses it does not know what has changed. Before the first one, changes are not reported.
        is_fresh = time.monotonic() - self.heard_at < self.fresh_seconds
        if is_fresh and id in self.names:
            return f"hit {self.names[id]}"
        if is_fresh:
            self.reads[id] = read
        try:
            name = (await self.users.GetUser(GetUserRequest(id=id))).full_name
        except UserNotFound:
            name = "-"
        if self.reads.get(id) is read:  # no change has arrived since the read began
            self.names[id] = name
            del self.reads[id]
        return f"miss {name}"


async def follow(sink: Store | Cache, connection: Any) -> None:
    """Apply changes for ever."""
    backoff = Backoff(max_retries=sys.maxsize, retry_connect=True)
    while True:
        try:
            token = await sink.begin()
            async for response in watch_changes(connection, token, [Change.USERS]):
                sink.apply(response)
        except (FeedReset, TokenExpired):
            sink.clear()
        except RosterError as error:
            await backoff.wait(error)


async def main(kind: str, address: str, file: str) -> None:
    async with channel(address) as connection:
        users = UserServiceStub(connection)
        sink: Store | Cache = Cache(users)
        if kind != "cache":
            sink = {"index": Index, "mirror": Mirror}[kind](file, users)
        following = asyncio.create_task(follow(sink, connection))
        while (question := await asyncio.to_thread(sys.stdin.readline)) and not following.done():
            print(await sink.ask(question.strip()), flush=True)
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
