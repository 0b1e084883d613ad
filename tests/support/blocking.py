"""The blocking client, called from tests that are coroutines: each call runs in a thread."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal

from roster import client
from roster.client import blocking
from roster.v1.users_pb2_grpc import UserServiceStub

Kind = Literal["asyncio", "blocking"]


class AwaitableStub:
    """A stub of the blocking client with the interface of the other."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)
        if name.startswith("Export"):
            return lambda *arguments, **options: _responses(method(*arguments, **options))
        return lambda *arguments, **options: asyncio.to_thread(method, *arguments, **options)


async def _responses(call: Any) -> AsyncIterator[Any]:
    while (response := await asyncio.to_thread(next, call, None)) is not None:
        yield response


@asynccontextmanager
async def _blocking_users(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
    with blocking.channel(*arguments, **options) as connection:
        yield AwaitableStub(UserServiceStub(connection))


@asynccontextmanager
async def _async_users(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
    async with client.channel(*arguments, **options) as connection:
        yield UserServiceStub(connection)


def users_of(kind: Kind, *arguments: Any, **options: Any) -> AbstractAsyncContextManager[Any]:
    """Return a stub on a channel of either client; the arguments are those of `channel`."""
    make = _blocking_users if kind == "blocking" else _async_users
    return make(*arguments, **options)
