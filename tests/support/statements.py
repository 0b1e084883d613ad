"""The statements that reach the database drivers, with their parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiosqlite
import asyncpg
import pytest
from sqlalchemy import Engine, event


class Statement(NamedTuple):
    """SQL in the driver's own form, and the values of its parameters."""

    sql: str
    parameters: tuple[Any, ...]


@contextmanager
def record_statements() -> Iterator[list[Statement]]:
    """Record every statement of this process while the block runs, in the order in which they are sent.

    Most go through SQLAlchemy; single look-ups and exports call the driver directly.
    """
    recorded: list[Statement] = []

    def before_cursor_execute(connection: Any, cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        recorded.append(Statement(sql, tuple(parameters)))

    fetch = asyncpg.Connection.fetch
    execute_fetchall = aiosqlite.Connection.execute_fetchall

    async def recorded_fetch(self: Any, sql: str, *parameters: Any, **options: Any) -> Any:
        recorded.append(Statement(sql, parameters))
        return await fetch(self, sql, *parameters, **options)

    async def recorded_fetchall(self: Any, sql: str, parameters: Any = ()) -> Any:
        recorded.append(Statement(sql, tuple(parameters)))
        return await execute_fetchall(self, sql, parameters)

    event.listen(Engine, "before_cursor_execute", before_cursor_execute)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncpg.Connection, "fetch", recorded_fetch)
            patch.setattr(aiosqlite.Connection, "execute_fetchall", recorded_fetchall)
            yield recorded
    finally:
        event.remove(Engine, "before_cursor_execute", before_cursor_execute)
