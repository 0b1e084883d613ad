"""Exports: all rows of an entity, and the token with which a consumer continues after them."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from google.protobuf.message import Message

from roster.errors import RosterError
from service.changes.feed import Feed
from service.consistency import Requirement, current_requirement, latest
from service.db.engine import Database
from service.db.errors import cause_of
from service.db.reads import Reader
from service.db.replica import PRIMARY_SECONDS
from service.encoding import RowEncoder
from service.wire import ExportRequest, export_from_request

log = logging.getLogger(__name__)

TOKEN_SECONDS = 1.0  # then the export begins without a token
PART_OF_TIME = 4  # of the time until the deadline, which the token may take


class Request(ExportRequest, Protocol):
    filter: str


class Exports:
    """Exports rows, from the primary or from replicas."""

    def __init__(self, database: Database, feed: Feed) -> None:
        self._replica = database.replica
        self._feed = feed

    async def run(
        self, reader: Reader, encoder: RowEncoder, response: type[Message], request: Request
    ) -> AsyncGenerator[Any]:
        """Yield the responses of an export; raises InvalidFilter and the errors of the database.

        The first one has the token, unless the export is resumed, or the feed can't be read. If there are no
        rows, it has nothing else.
        """
        after_id, limit = export_from_request(request)
        token, requirement = "", current_requirement()
        if after_id == 0:
            token, requirement = await self._begin(requirement)
        batches = reader.export(request.filter, after_id, limit, requirement)
        async with aclosing(batches):
            async for rows in batches:
                yield encoder.response(rows, response(last_id=rows[-1].id, watch_token=token))
                token = ""
        if token:
            yield response(watch_token=token)

    async def _begin(self, requirement: Requirement | None) -> tuple[str, Requirement | None]:
        """Return the token, "" if there is none, and what the reads after it require of a replica."""
        seconds = TOKEN_SECONDS
        if requirement and requirement.deadline is not None:
            left = requirement.deadline - asyncio.get_running_loop().time()
            seconds = min(seconds, left / PART_OF_TIME)
        try:
            async with asyncio.timeout(seconds):
                token = str(await self._feed.now())
                stricter = await self._require(requirement) if requirement else None
        except (TimeoutError, RosterError) as error:
            log.debug("an export has no token: %s", cause_of(error))
            return "", requirement
        except Exception:
            log.exception("an export has no token")
            return "", requirement
        if requirement and stricter is None:
            return "", requirement
        return token, stricter

    async def _require(self, requirement: Requirement) -> Requirement | None:
        """Return the requirement of reads that see all that the token stands for; None if no replica has it.

        The position is read after the token. A transaction that the token sees had written its commit to the
        log of PostgreSQL by then, so a replica that has replayed this position has its rows. At a position
        read before, a transaction could be missing that committed in between: the export would lack its rows,
        and the token stands for them. All reads require the position, as each may be on another replica.
        """
        if self._replica is None:
            return requirement
        position = await self._replica.primary.current(PRIMARY_SECONDS)
        needed = position and latest([requirement.position, position])
        if needed is None:
            return None
        stricter = Requirement(needed, requirement.deadline)
        return stricter if await self._replica.reaches(stricter) else None
