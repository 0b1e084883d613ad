"""The statements that reach the database drivers, with their parameters."""

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiosqlite
import asyncpg
import pytest
from sqlalchemy import Engine, event

from service.db.distribution import DISTRIBUTED

# What any server sends without a call: the health check, the heartbeat, the keys of page tokens, the deletion
# of expired rows.
CHORES = re.compile(
    r"SELECT 1$|SELECT 1 FROM feed|\s+SELECT (least|coalesce)\(|UPDATE (bulk_loads|feed) "
    "|DELETE FROM (requests|bulk_batches|changes) "
    "|(DELETE FROM|INSERT INTO) (roster_servers|page_token_keys|feed) "
)


class Statement(NamedTuple):
    """SQL in the driver's own form, and the values of its parameters."""

    sql: str
    parameters: tuple[Any, ...]


Fetch = Callable[[], Awaitable[Any]]


@contextmanager
def intercept_fetches(interceptor: Callable[[Statement, Fetch], Awaitable[Any]]) -> Iterator[None]:
    """Pass every statement that bypasses SQLAlchemy to an interceptor while the block runs.

    The interceptor calls the driver, and returns its rows. It does not see what a new connection asks first.
    """
    fetch = asyncpg.Connection.fetch
    execute_fetchall = aiosqlite.Connection.execute_fetchall

    async def intercepted_fetch(self: Any, sql: str, *parameters: Any, **options: Any) -> Any:
        if sql == DISTRIBUTED:
            return await fetch(self, sql)
        statement = Statement(sql, parameters)
        return await interceptor(statement, lambda: fetch(self, sql, *parameters, **options))

    async def intercepted_fetchall(self: Any, sql: str, parameters: Any = ()) -> Any:
        statement = Statement(sql, tuple(parameters))
        return await interceptor(statement, lambda: execute_fetchall(self, sql, parameters))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncpg.Connection, "fetch", intercepted_fetch)
        patch.setattr(aiosqlite.Connection, "execute_fetchall", intercepted_fetchall)
        yield


@contextmanager
def record_statements() -> Iterator[list[Statement]]:
    """Record every statement of this process while the block runs, in the order in which they are sent.

    Most go through SQLAlchemy; single look-ups and exports call the driver directly.
    """
    recorded: list[Statement] = []

    def before_cursor_execute(connection: Any, cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        recorded.append(Statement(sql, tuple(parameters)))

    async def record(statement: Statement, fetch: Fetch) -> Any:
        recorded.append(statement)
        return await fetch()

    event.listen(Engine, "before_cursor_execute", before_cursor_execute)
    try:
        with intercept_fetches(record):
            yield recorded
    finally:
        event.remove(Engine, "before_cursor_execute", before_cursor_execute)
