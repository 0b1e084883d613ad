"""Notices commits that no standby has confirmed although they were to wait for one.

With synchronous replication, COMMIT waits until a standby has the transaction. If that is cancelled, as by
pg_cancel_backend, PostgreSQL sends a warning, and then the same answer as for every commit. The transaction
exists on the primary only, and a failover would lose it.
https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION
"""

from typing import Any

import asyncpg

# The function of the server that sends the warning, whose text depends on the language.
WAIT = "SyncRepWaitForLSN"


class DurableConnection(asyncpg.Connection):
    """A connection whose `execute`, and so each commit, raises 08007 if a standby has not confirmed it."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.was_wait_cancelled = False
        self.add_log_listener(_listen)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Execute a command; raises TransactionResolutionUnknownError if it has not waited for a standby."""
        self.was_wait_cancelled = False
        status: str = await super().execute(query, *args, timeout=timeout)
        if self.was_wait_cancelled:
            raise asyncpg.TransactionResolutionUnknownError("no standby has confirmed the commit")
        return status


def _listen(connection: Any, message: Any) -> None:
    # The driver calls this before it passes on the answer of the statement.
    if message.server_source_function == WAIT:
        connection.was_wait_cancelled = True
