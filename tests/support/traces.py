"""Traces of a person: where texts occur in a database, and in the files of SQLite."""

import sqlite3
import zlib
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, text

from service.db.engine import Database


async def traces(database: Database, needles: Collection[bytes]) -> set[str]:
    """Return the columns of all tables that contain one of the needles, in any case, compressed ones too."""
    async with database.read() as session:
        connection = await session.connection()
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        found = set()
        for table in tables:
            rows = (await session.execute(text(f'SELECT * FROM "{table}"'))).mappings()
            found |= {
                f"{table}.{column}"
                for row in rows
                for column, value in row.items()
                if contains(_bytes(value), needles)
            }
    return found


def contains(content: bytes, needles: Collection[bytes]) -> bool:
    """Return whether a content contains one of the needles, in any case."""
    lower = content.lower()
    return any(needle.lower() in lower for needle in needles)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        return str(value).encode()
    with suppress(zlib.error):
        return value + zlib.decompress(value)
    return value


def vacuum(path: Path) -> None:
    """Rewrite a SQLite file, and empty its WAL, as an operator would while the server runs."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("VACUUM")
        [(is_busy, *_)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert not is_busy


def files(path: Path) -> bytes:
    """Return the content of a SQLite file, its WAL and its index of the WAL."""
    every = [path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))]
    return b"".join(each.read_bytes() for each in every if each.exists())
