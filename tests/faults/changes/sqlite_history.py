"""Random histories on SQLite, which has one writer at a time."""

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from random import Random
from typing import Any

from tests.faults.changes.followers import Stubs
from tests.faults.changes.history import Trial
from tests.faults.changes.mirror import PROBE, TABLES, Rows, select_rows
from tests.faults.changes.writers import CallWriter
from tests.support.server import serve

OPERATIONS = 150
WRITERS = 6
BUSY_SECONDS = 10
PROBE_STATEMENTS = (
    "INSERT INTO users (email) VALUES (?)",
    f"INSERT INTO posts (title, content, author_id) VALUES ('{PROBE}', '', last_insert_rowid())",
)
NEWEST = f"(SELECT max(id) FROM users WHERE email NOT LIKE '{PROBE}%')"
# Of another program: a restore under the same id, with a post; then an update of others.
STATEMENTS = (
    "SAVEPOINT one",
    f"DELETE FROM users WHERE id = {NEWEST}",
    "ROLLBACK TO one",
    f"CREATE TEMP TABLE newest AS SELECT {NEWEST} AS id",
    "DELETE FROM users WHERE id = (SELECT id FROM newest)",
    "INSERT INTO users (id, email) SELECT id, 'back' || id || '@example.org' FROM newest WHERE id > 0",
    "INSERT INTO posts (title, content, author_id) SELECT 'New', '', id FROM newest WHERE id > 0",
    "UPDATE users SET full_name = hex(randomblob(8)), version = version + 1 WHERE id % 5 = 0",
)


async def replay_on_sqlite(history: dict[str, Any], url: str) -> None:
    """Run a history on a migrated file; raises Wrong if a mirror is wrong."""
    async with serve(url, caller_streams=1000) as server:
        await SqliteTrial(history, url).run([server.address])


def draw_history_on_sqlite(random: Random) -> dict[str, Any]:
    """Return a random history."""
    return {"seed": random.getrandbits(32), "operations": OPERATIONS, "bulk_loads": 1}


class SqliteTrial(Trial):
    """Runs a history against one server, and with another program that writes the file."""

    async def _check_all(self, servers: Sequence[Stubs]) -> None:
        writers = [CallWriter(servers, self.plan, self._other_random()) for _ in range(WRITERS)]
        await asyncio.gather(*(writer.run() for writer in writers), self._write_until_done())
        await self._check_liveness(servers)
        self._is_quiet = True
        await self._check_equality("after all writes")
        self._check_lags()

    async def _write_until_done(self) -> None:
        while not self.plan.is_empty:
            end = "ROLLBACK" if self.random.random() < 0.3 else "COMMIT"
            await asyncio.to_thread(self._transact, [*STATEMENTS, end])
            await asyncio.sleep(0.05)

    def _transact(self, statements: Sequence[str]) -> None:
        with closing(self._file()) as file:
            file.execute("BEGIN IMMEDIATE")
            for statement in statements:
                file.execute(statement)

    def _file(self) -> sqlite3.Connection:
        path = self.url.partition("///")[2]
        file = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        file.execute("PRAGMA foreign_keys = ON")
        return file

    async def _probe(self) -> tuple[float, int]:
        self.probes.append(await asyncio.to_thread(self._insert_probe))
        return self.probes[-1][:2]

    def _insert_probe(self) -> tuple[float, int, int]:
        email = f"{PROBE}{self.random.getrandbits(64)}@example.org"
        with closing(self._file()) as file:
            file.execute("BEGIN IMMEDIATE")
            user = file.execute(PROBE_STATEMENTS[0], (email,)).lastrowid
            post = file.execute(PROBE_STATEMENTS[1]).lastrowid
            file.execute("COMMIT")
        return time.monotonic(), user or 0, post or 0

    async def _stored(self) -> Rows:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Rows:
        rows: Rows = {}
        with closing(self._file()) as file:
            file.execute("BEGIN")
            for table in TABLES.values():
                for id, *values in file.execute(select_rows(table, is_sqlite=True)):
                    rows[table, id] = tuple(values)
        return rows
