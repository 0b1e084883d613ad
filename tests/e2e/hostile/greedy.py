"""A greedy caller in its own process: `python -m tests.e2e.hostile.greedy ADDRESS CA TOKEN ATTACK`.

It prints `begun` once its calls are in flight, and continues until its standard input ends. It has a low CPU
priority, as if it ran on another machine.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import grpc

from roster.client import tls_credentials
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    ListUsersRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub

# Matches nobody, so that the whole table is read; a second and more of one core.
UNINDEXED = " OR ".join(f'full_name : "zz{number}"' for number in range(20))
DEAR = "$2b$14$" + "." * 21 + "u" + "." * 31
BATCH = 1000
ROWS = 5000
NUMBERS = count()


async def filters(users: UserServiceAsyncStub) -> None:
    """List with a filter that no index supports."""
    await users.ListUsers(ListUsersRequest(filter=UNINDEXED))


async def deadlines(users: UserServiceAsyncStub) -> None:
    """List the same, cancel, and try again."""
    await users.ListUsers(ListUsersRequest(filter=UNINDEXED), timeout=0.2)


async def batches(users: UserServiceAsyncStub) -> None:
    """Get the largest batch of ids."""
    await users.BatchGetUsers(BatchGetUsersRequest(ids=range(1, BATCH + 1)))


async def logins(users: UserServiceAsyncStub) -> None:
    """Guess a password."""
    await users.VerifyPassword(VerifyPasswordRequest(email="nobody@example.org", password="guess"))


async def expensive_logins(users: UserServiceAsyncStub) -> None:
    """Guess the password of a user whose hash has the highest cost that is allowed."""
    await users.VerifyPassword(VerifyPasswordRequest(email="dear@example.org", password="guess"))


async def exports(users: UserServiceAsyncStub) -> None:
    """Export all users, and read as fast as possible."""
    stream: Any = users.ExportUsers(ExportUsersRequest())
    while await stream.read() is not grpc.aio.EOF:
        pass


async def writes(users: UserServiceAsyncStub) -> None:
    """Create a user."""
    await users.CreateUser(CreateUserRequest(user=User(email=f"greedy{next(NUMBERS)}@example.org")))


async def loads(users: UserServiceAsyncStub) -> None:
    """Open a bulk stream, and send the largest messages."""

    async def messages() -> AsyncIterator[BulkCreateUsersRequest]:
        yield BulkCreateUsersRequest(options=BulkOptions())
        for _ in range(20):
            emails = (f"bulk{next(NUMBERS)}@example.org" for _ in range(ROWS))
            yield BulkCreateUsersRequest(users=[User(email=email) for email in emails])

    async for _ in users.BulkCreateUsers(messages()):
        pass


ATTACKS: dict[str, tuple[Callable[[UserServiceAsyncStub], Coroutine[Any, Any, None]], int]] = {
    "filters": (filters, 30),
    "deadlines": (deadlines, 60),
    "batches": (batches, 100),
    "logins": (logins, 100),
    "expensive_logins": (expensive_logins, 100),
    "exports": (exports, 16),
    "writes": (writes, 100),
    "loads": (loads, 16),
}


async def create_expensive_user(users: UserServiceAsyncStub) -> None:
    """Store a user whose password hash has the highest cost that is allowed."""
    with suppress(grpc.RpcError):  # stored already
        await users.CreateUser(CreateUserRequest(user=User(email="dear@example.org", hashed_password=DEAR)))


async def main(address: str, certificates: bytes, token: str, name: str) -> None:
    """Keep many calls in flight."""
    attack, number = ATTACKS[name]
    channels = [
        grpc.aio.secure_channel(
            address,
            tls_credentials(certificates, token=lambda: token),
            [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 << 20)],
        )
        for _ in range(4)
    ]
    stubs = [UserServiceStub(channel) for channel in channels]
    if name == "expensive_logins":
        await create_expensive_user(stubs[0])

    async def again(users: UserServiceAsyncStub) -> None:
        while True:
            with suppress(grpc.RpcError):
                await attack(users)

    calls = [asyncio.create_task(again(stubs[i % len(stubs)])) for i in range(number)]
    await asyncio.sleep(0.5)
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


if __name__ == "__main__":
    os.nice(10)
    address, ca, token, name = sys.argv[1:]
    asyncio.run(main(address, Path(ca).read_bytes(), token, name))
