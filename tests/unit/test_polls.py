"""The pages that the polls of the change feed keep for watchers."""

import asyncio
from typing import Any

import pytest

from roster.v1.changes_pb2 import Change
from roster.v1.resources_pb2 import Post
from service.changes import head
from service.changes.feed import ChangePage
from service.changes.token import Token

POST_BYTES = 1000
PAGES = 6
TOKEN = Token("0" * 32, "1")


class LargePages:
    """A feed of some pages with one post each."""

    def __init__(self) -> None:
        self.left = PAGES

    async def now(self) -> Token:
        return TOKEN

    async def read(self, token: Token) -> ChangePage:
        await asyncio.sleep(0)
        self.left -= 1
        changes = [Change(post=Post(content="x" * POST_BYTES))] if self.left >= 0 else []
        return ChangePage(changes, token, has_more=self.left > 0)


async def test_keeps_pages_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that needs an older one reads the log."""
    monkeypatch.setattr(head, "MAX_KEPT_BYTES", 3 * POST_BYTES)  # of two pages, with what is around the text
    feed: Any = LargePages()
    polls = head.Polls(feed)
    async with asyncio.timeout(10):
        while polls.number < PAGES:
            await polls.wait(polls.number, 1)
    polls.stop()

    kept = [number for number in range(PAGES) if polls.page_after(number)]

    assert kept == [PAGES - 2, PAGES - 1]
