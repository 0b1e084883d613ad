"""Head: the newest position of the feed, which all watchers of this process share.

While there are watchers, one task polls the log, and keeps the last pages with changes. A watcher that has
everything up to one of them waits for the next one. One that is further back reads the log itself.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from copy import copy
from typing import Protocol

from roster.errors import RosterError, StatementTimeout, Unavailable
from roster.v1.changes_pb2 import WatchChangesResponse
from service.changes.feed import ChangePage, Feed
from service.changes.kinds import ENTITIES, entity_of
from service.changes.token import Token
from service.metrics import WATCH_LAG, WATCHERS

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0
PATIENCE_SECONDS = 10.0  # while the log can't be read; then the watches end
MAX_PAGES = 16
MAX_KEPT_BYTES = 12 << 20  # of these pages, without what is encoded; a page has at most 3 MiB


class Watcher(Protocol):
    """A watcher, as the polls see it: `behind_since` is when it last had all changes, None if it has them."""

    behind_since: float | None


class SharedPage:
    """A page with changes; its response is encoded once for all watchers of the same entities.

    It was read at `read_at`, in the time of the event loop.
    """

    def __init__(self, number: int, page: ChangePage, read_at: float) -> None:
        self.number = number
        self.token = page.token
        self.read_at = read_at
        self.size = sum(change.ByteSize() for change in page.changes)
        self._changes = page.changes
        self._responses: dict[tuple[int, ...], tuple[int, bytes]] = {}

    def response(self, entities: tuple[int, ...]) -> tuple[int, bytes]:
        """Return the number of changes of these entities, and the response with them."""
        if entities not in self._responses:
            changes = [change for change in self._changes if entity_of(change) in entities]
            token = str(self.token.for_entities(entities))
            response = WatchChangesResponse(changes=changes, token=token)
            self._responses[entities] = len(changes), response.SerializeToString()
        return self._responses[entities]


class Head:
    """The polls of a feed, begun for its first watcher and ended with the last one, or with an error."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._polls: Polls | None = None
        self._is_draining = False

    @asynccontextmanager
    async def watch(self, watcher: Watcher) -> AsyncIterator["Polls"]:
        """Return the polls after one that begins after this call; raises its error."""
        if self._polls is None or self._polls.failure:
            self._polls = Polls(self._feed)
        polls = self._polls
        polls.is_draining = self._is_draining
        polls.watchers.add(watcher)
        WATCHERS.inc()
        try:
            await polls.refresh()
            yield polls
        finally:
            polls.watchers.remove(watcher)
            WATCHERS.dec()
            if not polls.watchers:
                polls.stop()
                self._polls = None if self._polls is polls else self._polls

    def drain(self) -> None:
        """Let all watches end with their last token."""
        self._is_draining = True
        if self._polls:
            self._polls.is_draining = True
            self._polls.wake()


class Polls:
    """Polls of the log in one task. `number` is that of the last page, `token` the position after it."""

    def __init__(self, feed: Feed) -> None:
        self.watchers: set[Watcher] = set()
        self.number = 0
        self.failure: Exception | None = None
        self.is_draining = False
        self._feed = feed
        self._token: Token | None = None
        self._pages: deque[SharedPage] = deque(maxlen=MAX_PAGES)
        self._waiting: list[asyncio.Future[None]] = []  # for a poll that has not begun
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()  # replaced when it is set
        self._task = asyncio.create_task(self._run(), context=Context())

    @property
    def token(self) -> Token:
        """The position after the last page, for all entities."""
        if self._token is None:
            raise RuntimeError("nothing has been read yet")
        return self._token

    async def refresh(self) -> None:
        """Wait for a poll that begins after this call; raises its error."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._asked.set()
        await future

    async def wait(self, number: int, seconds: float) -> None:
        """Wait some seconds for a page after one, or until the server drains.

        Raises the error that has ended the polls.
        """
        if self.number == number and not self.is_draining and not self.failure:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        if self.failure:
            raise _copy(self.failure)

    def page_after(self, number: int) -> SharedPage | None:
        """Return the page after one; None if it is no longer kept."""
        position = len(self._pages) - (self.number - number)
        return self._pages[position] if position >= 0 else None

    def wake(self) -> None:
        """Wake all watchers."""
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """End the polls."""
        self._task.cancel()
        WATCH_LAG.set(0)

    async def _run(self) -> None:
        try:
            await self._poll_forever()
        except RosterError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the log of changes can't be read")
            self._fail(error)

    async def _poll_forever(self) -> None:
        loop = asyncio.get_running_loop()
        succeeded_at = loop.time()
        while True:
            self._asked.clear()
            waiting, self._waiting = self._waiting, []
            try:
                has_more = await self._poll()
            except Exception as error:
                self._waiting = waiting + self._waiting
                is_patient = self._token and loop.time() - succeeded_at < PATIENCE_SECONDS
                if not (is_patient and isinstance(error, Unavailable | StatementTimeout)):
                    raise
                await asyncio.sleep(RETRY_SECONDS)
                self._report_lag(loop.time(), succeeded_at)
                continue
            succeeded_at = loop.time()
            self._report_lag(succeeded_at)
            for future in waiting:
                if not future.done():
                    future.set_result(None)
            if not has_more:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._asked.wait()

    async def _poll(self) -> bool:
        """Read the next page, and return whether others follow."""
        if self._token is None:
            self._token = (await self._feed.now()).for_entities(ENTITIES)
            return False
        read_at = asyncio.get_running_loop().time()
        page = await self._feed.read(self._token)
        self._token = page.token
        if page.changes:
            self.number += 1
            self._pages.append(SharedPage(self.number, page, read_at))
            while sum(kept.size for kept in self._pages) > MAX_KEPT_BYTES:
                self._pages.popleft()
            self.wake()
        return page.has_more

    def _report_lag(self, now: float, complete_at: float | None = None) -> None:
        """Set the metric; no watcher has had all changes since `complete_at` if it is given."""
        times = [watcher.behind_since for watcher in self.watchers]
        behind = [time for time in (complete_at, *times) if time is not None]
        WATCH_LAG.set(now - min(behind, default=now))

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for future in self._waiting:
            if not future.done():
                future.set_exception(_copy(error))
        self._waiting = []
        self.wake()


def _copy(error: Exception) -> Exception:
    """Return a copy of an error for one watcher: an error raised by many would collect their tracebacks."""
    own = copy(error) if isinstance(error, RosterError) else RuntimeError("the log of changes can't be read")
    own.__cause__ = error
    return own
