"""Retries with exponential backoff, for outages that outlast the retries of a single call."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from roster.client.causes import no_server
from roster.client.errors import Disconnected, ProxyUnavailable, is_retryable
from roster.client.waiting import within
from roster.errors import RosterError

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

MAX_RETRIES = 20  # about two minutes
FIRST_PAUSE_SECONDS = 0.25
MAX_PAUSE_SECONDS = 10.0
MAX_DOUBLINGS = 16  # a larger power of two would not fit a float


class Backoff:
    """Waits between retries: each pause is twice the last, with jitter, up to `max_retries` in a row.

    If no call has succeeded yet, a server that can't be reached may be a wrong address: this is retried only
    with `retry_connect`.

    If `watch` was called, a pause for a server that can't be reached ends as soon as the channel is connected
    again. A connection that does not last must not use up the retries: a shortened pause is followed by a
    full one, unless a call has succeeded. A server that answers, even with UNAVAILABLE, gets the full pause.
    """

    def __init__(
        self,
        max_retries: int = MAX_RETRIES,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        *,
        retry_connect: bool = False,
    ) -> None:
        self._max_retries = max_retries
        self._first_pause_seconds = first_pause_seconds
        self._retry_connect = retry_connect
        self._retries = 0
        self._connection: grpc.aio.Channel | None = None
        self._was_shortened = False  # the last pause

    def watch(self, connection: grpc.aio.Channel) -> None:
        """End pauses early when this channel, which was disconnected, is connected again."""
        self._connection = connection

    def reset(self) -> None:
        """Start again with the shortest pause, after a call has succeeded."""
        self._retries = 0
        self._retry_connect = True
        self._was_shortened = False

    async def wait(self, failure: RosterError, raised: RosterError | None = None) -> None:
        """Sleep before the next retry, or raise `raised` (by default the failure) if there is none."""
        is_wrong_address = isinstance(failure, Disconnected) and not self._retry_connect
        if is_wrong_address or not is_retryable(failure) or self._retries >= self._max_retries:
            raise raised or failure
        longest = min(self._first_pause_seconds * 2 ** min(self._retries, MAX_DOUBLINGS), MAX_PAUSE_SECONDS)
        self._retries += 1
        # The server's RetryInfo is the shortest time that a client should wait.
        server_delay = failure.retry_after_seconds or 0
        seconds = server_delay + random.uniform(longest / 2, longest)  # noqa: S311
        is_away = isinstance(failure, Disconnected) and not isinstance(failure, ProxyUnavailable)
        log.warning("%s; trying again in %.1f s", _cause(failure) if is_away else failure, seconds)
        if is_away and self._connection and not self._was_shortened:
            self._was_shortened = await self._pause_until_connected(self._connection, seconds)
        else:
            await asyncio.sleep(seconds)
            self._was_shortened = False

    async def _pause_until_connected(self, connection: grpc.aio.Channel, seconds: float) -> bool:
        """Sleep, at most until the channel is connected; return whether it was connected before the end."""
        try:
            await within(seconds, _connected_again(connection))
        except TimeoutError:
            return False
        # All clients of a server notice at once that it is back.
        await asyncio.sleep(random.uniform(0, self._first_pause_seconds))  # noqa: S311
        return True

    async def call(self, method: Callable[[RequestT], Awaitable[ResponseT]], request: RequestT) -> ResponseT:
        """Return the response of a unary RPC that is safe to repeat; raises RosterError."""
        while True:
            try:
                response = await method(request)
            except RosterError as error:
                await self.wait(error)
            else:
                self.reset()
                return response


def _cause(failure: RosterError) -> str:
    return failure.message if failure.message.startswith(no_server("")) else "the connection was lost"


async def _connected_again(connection: grpc.aio.Channel) -> None:
    """Wait until a channel is connected; one that is connected now must first lose its connection."""
    state = connection.get_state(try_to_connect=True)
    while True:
        await connection.wait_for_state_change(state)
        state = connection.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
