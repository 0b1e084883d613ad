"""To try again what may pass, for longer than a call's own retries do."""

import asyncio
import logging
import random
from typing import Any

from google.protobuf.message import Message

from service.client.errors import Disconnected, may_pass
from service.errors import RosterError

log = logging.getLogger(__name__)

TRIES = 20  # about two minutes
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0


class Patience:
    """Tries again what may pass: after longer and longer pauses, with jitter, and not for ever.

    An address where nobody has answered yet may be a wrong one: it is tried again only if `is_known`.
    """

    def __init__(
        self, tries: int = TRIES, first_pause_seconds: float = FIRST_PAUSE_SECONDS, *, is_known: bool = False
    ) -> None:
        self._tries = tries
        self._first_pause_seconds = first_pause_seconds
        self._failed_tries = 0
        self._is_known = is_known

    def renew(self) -> None:
        """Begin anew: a try got somewhere."""
        self._failed_tries = 0
        self._is_known = True

    async def endure(self, failure: RosterError, raised: RosterError | None = None) -> None:
        """Wait before the next try; raises the failure, or what stands for it."""
        is_wrong = isinstance(failure, Disconnected) and not self._is_known
        if is_wrong or not may_pass(failure) or self._failed_tries >= self._tries:
            raise raised or failure
        longest = min(self._first_pause_seconds * 2**self._failed_tries, LONGEST_PAUSE_SECONDS)
        self._failed_tries += 1
        seconds = (failure.retry_after_seconds or 0) + random.uniform(longest / 2, longest)  # noqa: S311
        told = "no server answers" if isinstance(failure, Disconnected) else failure
        log.warning("%s; trying again in %.1f s", told, seconds)
        await asyncio.sleep(seconds)

    async def call(self, method: Any, request: Message) -> Any:
        """Return the answer of a unary RPC that can be repeated; raises RosterError."""
        while True:
            try:
                answer = await method(request)
            except RosterError as error:
                await self.endure(error)
            else:
                self.renew()
                return answer
