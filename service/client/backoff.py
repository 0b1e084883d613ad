"""Retries with exponential backoff, for outages that outlast the retries of a single call."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import Message

from service.client.errors import Disconnected, is_retryable
from service.errors import RosterError

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

MAX_RETRIES = 20  # about two minutes
FIRST_PAUSE_SECONDS = 0.25
MAX_PAUSE_SECONDS = 10.0


class Backoff:
    """Waits between retries: each pause is twice the last, with jitter, up to `max_retries` in a row.

    If no call has succeeded yet, a server that can't be reached may be a wrong address: this is retried only
    with `retry_connect`.
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

    def reset(self) -> None:
        """Start again with the shortest pause, after a call has succeeded."""
        self._retries = 0
        self._retry_connect = True

    async def wait(self, failure: RosterError, raised: RosterError | None = None) -> None:
        """Sleep before the next retry, or raise `raised` (by default the failure) if there is none."""
        is_wrong_address = isinstance(failure, Disconnected) and not self._retry_connect
        if is_wrong_address or not is_retryable(failure) or self._retries >= self._max_retries:
            raise raised or failure
        longest = min(self._first_pause_seconds * 2**self._retries, MAX_PAUSE_SECONDS)
        self._retries += 1
        # The server's RetryInfo is the shortest time that a client should wait.
        server_delay = failure.retry_after_seconds or 0
        seconds = server_delay + random.uniform(longest / 2, longest)  # noqa: S311
        cause = "no server answers" if isinstance(failure, Disconnected) else failure
        log.warning("%s; trying again in %.1f s", cause, seconds)
        await asyncio.sleep(seconds)

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
