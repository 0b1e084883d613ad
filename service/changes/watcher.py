"""Watches: each sends changes at the pace of its client.

A watch follows the polls while it has everything up to one of the pages that they keep. Otherwise it reads
the log itself, until it has caught up:

            end of the log                  a page is no longer kept
    reads the log ────────► follows the polls ────────► reads the log

While its client does not read, it holds one encoded response, and no connection or transaction.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from roster.errors import Draining
from roster.v1.changes_pb2 import Change, WatchChangesResponse
from service.auth.caller import current_share
from service.changes.feed import Feed
from service.changes.head import Head, Polls
from service.changes.token import Token
from service.shares import FairSemaphore

HEARTBEAT_SECONDS = 10.0
LAST_RESPONSE_SECONDS = 0.5  # to send it, once the server stops
MAX_READERS = 2  # watches that read the log themselves, at a time
STOPPING = "the server is stopping; continue on another one with the last token"

# Sends an encoded response with a number of changes.
Send = Callable[[bytes, int], Awaitable[None]]


class Watches:
    """The watches of a process."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._head = Head(feed)
        self._readers = FairSemaphore(MAX_READERS)
        self._limits: set[asyncio.Timeout] = set()
        self._end: float | None = None

    async def run(self, token: Token | None, entities: tuple[int, ...], send: Send) -> None:
        """Send responses from a token on, or from now on; each is made after the client has read the last.

        Raises FeedReset, TokenExpired, Draining after a last response, and the errors of the database.
        """
        watch = Watch(self._feed, self._readers, entities, send)
        limit = asyncio.timeout_at(self._end)
        self._limits.add(limit)
        try:
            async with limit, self._head.watch(watch) as polls:
                await watch.run(polls, token)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Draining(STOPPING) from None
        finally:
            self._limits.remove(limit)

    def drain(self) -> None:
        """End all watches; their clients continue on another server.

        A client that does not read gets no last response.
        """
        self._head.drain()
        self._end = asyncio.get_running_loop().time() + LAST_RESPONSE_SECONDS
        for limit in self._limits:
            limit.reschedule(self._end)


class Watch:
    """One watch: what it has sent, and what it sends next."""

    def __init__(self, feed: Feed, readers: FairSemaphore, entities: tuple[int, ...], send: Send) -> None:
        self._feed = feed
        self._readers = readers
        self._entities = entities
        self._send = send
        self._now = asyncio.get_running_loop().time
        self._sent_at: float | None = None
        self._number: int | None = None  # of the last page of the polls that was sent; None while it reads
        self.behind_since: float | None = self._now()

    async def run(self, polls: Polls, token: Token | None) -> None:
        """Send responses until an error; raises Draining after the last one."""
        if token is None:
            self._number, token = polls.number, polls.token.for_entities(self._entities)
            await self._respond(_response(token))
        while not polls.is_draining:
            if self._number is None:
                token = await self._read(polls, token)
            else:
                token = await self._follow(polls, self._number, token)
        await self._respond(_response(token))
        raise Draining(STOPPING)

    async def _read(self, polls: Polls, token: Token) -> Token:
        """Send the next page of the log, and return the token after it."""
        share = current_share()
        await self._readers.acquire(share)
        try:
            if polls.is_draining:
                return token
            # The pages after the current one have what this one lacks, if it is the last one of the log.
            began, current = self._now(), polls.number
            page = await self._feed.read(token)
        finally:
            self._readers.release(share)
        if not page.has_more:
            self._number, self.behind_since = current, began
        token, size = page.token, len(page.changes)
        if size or self._sent_at is None:
            response = _response(token, page.changes)
            del page  # it must not be kept while the client does not read
            await self._respond(response, size)
        return token

    async def _follow(self, polls: Polls, number: int, token: Token) -> Token:
        """Send the next page of the polls if there is one in time, and return the token after it."""
        if polls.number == number:
            self.behind_since = None
        await polls.wait(number, self._heartbeat_at - self._now())
        if polls.number == number:
            token = polls.token.for_entities(self._entities)
        elif page := polls.page_after(number):
            token = page.token.for_entities(self._entities)
            size, response = page.response(self._entities)
            self._number, self.behind_since = page.number, page.read_at
            del page  # it must not be kept while the client does not read
            if size:
                await self._respond(response, size)
        else:
            self._number = None
            return token
        if self._now() >= self._heartbeat_at and not polls.is_draining:
            await self._respond(_response(token))
        return token

    @property
    def _heartbeat_at(self) -> float:
        return (self._sent_at or 0) + HEARTBEAT_SECONDS

    async def _respond(self, response: bytes, size: int = 0) -> None:
        await self._send(response, size)
        self._sent_at = self._now()


def _response(token: Token, changes: Sequence[Change] = ()) -> bytes:
    return WatchChangesResponse(changes=changes, token=str(token)).SerializeToString()
