"""`roster serve` with faults at its commits: each line of standard input orders one.

The service itself has no failpoints. The process dies when its standard input is closed.
"""

import os
import signal
import sys
from threading import Thread
from typing import Any

import asyncpg

from roster.errors import OutcomeUnknown
from service.cli import main
from service.db import engine

commit = engine._commit
next_fault = ""


def read_orders() -> None:
    """Read orders until standard input ends."""
    global next_fault  # noqa: PLW0603  (shared by the two threads)
    for line in sys.stdin:
        next_fault = line.strip()
    die()


def die() -> None:
    """Kill this process, as a loss of power would."""
    os.kill(os.getpid(), signal.SIGKILL)


async def commit_with_fault(session: Any) -> None:
    """Commit, with the ordered fault."""
    global next_fault
    fault, next_fault = next_fault, ""
    if fault == "die before commit":
        die()
    if fault == "terminate before commit":
        await terminate_backend(session)
    await commit(session)
    if fault == "die after commit":
        die()
    if fault == "lose the answer":
        raise OutcomeUnknown("the answer to a commit was lost, for a test")


async def terminate_backend(session: Any) -> None:
    """Terminate the session's backend between its last statement and its commit."""
    own = (await (await session.connection()).get_raw_connection()).driver_connection
    other = await asyncpg.connect(os.environ["ROSTER_DATABASE_URL"].replace("+asyncpg", ""))
    await other.execute(f"SELECT pg_terminate_backend({own.get_server_pid()}, 5000)")
    await other.close()


engine._commit = commit_with_fault
Thread(target=read_orders, daemon=True).start()
main(["serve"])
