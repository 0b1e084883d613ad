"""Calls, a named load and exports that go on while servers come and go, and an account of their answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Self

from roster.client import BulkLoader, channel
from roster.errors import Unavailable
from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub

ROW_SECONDS = 0.002  # one row of the load
BATCH_ROWS = 50
LOAD_ID = "upgrade"


class Traffic:
    """Traffic through one channel. Raises, at the end of the block, the error of any call that failed."""

    def __init__(self, target: str) -> None:
        self._channel = channel(target, timeout=60)
        self._users = UserServiceStub(self._channel)
        self._is_over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.created = 0  # users, one at a time
        self.loaded = 0  # rows that were read for the load
        self.acks: list[BulkAck] = []
        self.exports = 0  # completed

    async def __aenter__(self) -> Self:
        for work in (self._call, self._load, self._export):
            self._tasks.append(asyncio.create_task(work()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over.set()
        done = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        for error in done:
            if error:
                raise error

    async def progress(self) -> None:
        """Wait until each kind of traffic has got further; raises the error of one that failed."""
        before = (self.created, len(self.acks), self.exports)
        async with asyncio.timeout(60):
            while any(now <= then for now, then in zip(self._now(), before, strict=True)):
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.05)

    def _now(self) -> tuple[int, int, int]:
        return self.created, len(self.acks), self.exports

    async def _call(self) -> None:
        """Create users, and read and change each of them."""
        while not self._is_over.is_set():
            email = f"call{self.created}@example.org"
            user = await self._users.CreateUser(CreateUserRequest(user=User(email=email)))
            self.created += 1
            assert await self._users.GetUser(GetUserRequest(email=email)) == user
            change = User(id=user.id, version=user.version, full_name="Changed")
            changed = await self._users.UpdateUser(UpdateUserRequest(user=change))
            assert (changed.full_name, changed.version) == ("Changed", 2)

    async def _load(self) -> None:
        """Load one file of rows, slowly."""
        loader = BulkLoader(
            self._users.BulkCreateUsers,
            BulkCreateUsersRequest,
            BulkOptions(load_id=LOAD_ID, return_ids=True),
            batch_rows=BATCH_ROWS,
            max_retries=100,
        )
        async with aclosing(loader.run(self._rows())) as events:
            async for event in events:
                if isinstance(event, BulkAck):
                    self.acks.append(event)

    async def _rows(self) -> AsyncIterator[User]:
        while not self._is_over.is_set():
            yield User(email=f"row{self.loaded}@example.org")
            self.loaded += 1
            await asyncio.sleep(ROW_SECONDS)

    async def _export(self) -> None:
        """Export all users, again and again; an interrupted export continues after its last row."""
        while not self._is_over.is_set():
            emails: list[str] = []
            last_id = 0
            while True:
                try:
                    request = ExportUsersRequest(after_id=last_id, batch_size=100)
                    async for page in self._users.ExportUsers(request):
                        emails += [user.email for user in page.users]
                        last_id = page.last_id
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            assert len(set(emails)) == len(emails)
            self.exports += 1


async def stored_users(target: str) -> dict[str, User]:
    """Return all users by e-mail."""
    async with channel(target) as connection:
        users = UserServiceStub(connection)
        pages = [page async for page in users.ExportUsers(ExportUsersRequest())]
    return {user.email: user for page in pages for user in page.users}
