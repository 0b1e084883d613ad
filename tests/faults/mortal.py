"""`roster serve` that has accidents: a word on standard input says which, at the next commit.

A module of its own, so that the service has no failpoints. It dies with whoever holds its standard input.
"""

import os
import signal
import sys
from threading import Thread
from typing import Any

import asyncpg

from service.cli import main
from service.db import engine
from service.errors import OutcomeUnknown

commit = engine._commit
accident = ""


def obey() -> None:
    """Take orders, to the end."""
    global accident  # noqa: PLW0603  (the threads' only way to each other)
    for line in sys.stdin:
        accident = line.strip()
    die()


def die() -> None:
    """Die as a machine does that loses its power: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


async def accident_prone(session: Any) -> None:
    """Commit, in the way that was ordered."""
    global accident
    order, accident = accident, ""
    if order == "die before commit":
        die()
    if order == "terminate before commit":
        await terminate(session)
    await commit(session)
    if order == "die after commit":
        die()
    if order == "lose the answer":
        raise OutcomeUnknown("the answer to a commit was lost, for a test")


async def terminate(session: Any) -> None:
    """Let PostgreSQL end the session's backend, between its last statement and its commit."""
    own = (await (await session.connection()).get_raw_connection()).driver_connection
    other = await asyncpg.connect(os.environ["ROSTER_DATABASE_URL"].replace("+asyncpg", ""))
    await other.execute(f"SELECT pg_terminate_backend({own.get_server_pid()}, 5000)")
    await other.close()


engine._commit = accident_prone
Thread(target=obey, daemon=True).start()
main(["serve"])
