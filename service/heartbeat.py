"""The heartbeat of a server: its row in the table of running servers."""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from uuid import uuid4

from sqlalchemy import delete, func
from sqlalchemy.exc import DBAPIError

from roster.errors import RosterError
from service import __version__
from service.db import revisions
from service.db.base import Session, now
from service.db.dialect import insert
from service.db.engine import CancelledAfterCommit, Database
from service.db.servers import LIFETIME, RunningServer

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 10
WRITE_SECONDS = 5
STOP_SECONDS = 1  # a row that is not deleted in time expires
MAX_NAME_CHARACTERS = 255


class Heartbeat:
    """Keeps the row of this process, so that `roster migrate --contract` knows of it.

    Each write is a short transaction. If it fails, the next one is at the next interval. The sessions of the
    server can be seen, too. A SQLite file has no rows: each server migrates it at its start.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._id = uuid4()
        self._is_failing = False

    async def beat_forever(self) -> None:
        """Write the row and refresh it at an interval."""
        if self._database.is_sqlite:
            return
        await self._write(self._delete_dead, WRITE_SECONDS)
        while True:
            await self._write(self._refresh, WRITE_SECONDS)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def stop(self) -> None:
        """Delete the row."""
        if not self._database.is_sqlite:
            await self._write(self._delete, STOP_SECONDS)

    async def _write(self, write: Callable[[Session], Awaitable[None]], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds), self._database.begin() as session:
                await write(session)
        except CancelledAfterCommit:
            # The time was up during a commit, which has succeeded. Before Python 3.12, asyncio.timeout raises
            # no TimeoutError for a subclass of CancelledError. If the task itself is cancelled, it ends.
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
        except (RosterError, DBAPIError, OSError) as error:  # a TimeoutError is an OSError
            if not self._is_failing:
                reason = getattr(error, "orig", None) or str(error) or type(error).__name__
                log.warning("the table of running servers can't be written: %s", reason)
            self._is_failing = True
            return
        self._is_failing = False

    async def _refresh(self, session: Session) -> None:
        name = f"{socket.gethostname()}/{os.getpid()}"[:MAX_NAME_CHARACTERS]
        row = {"id": self._id, "name": name, "release": __version__, "revision": revisions.head()}
        written = insert(session, RunningServer).values(row)
        await session.execute(written.on_conflict_do_update(index_elements=["id"], set_={"seen_at": now()}))

    async def _delete(self, session: Session) -> None:
        await session.execute(delete(RunningServer).where(RunningServer.id == self._id))

    @staticmethod
    async def _delete_dead(session: Session) -> None:
        await session.execute(delete(RunningServer).where(RunningServer.seen_at < func.now() - LIFETIME))
