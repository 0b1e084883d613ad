"""`roster doctor --database` finds all capabilities in real databases, and each one that is missing.

The tests of PostgreSQL put a proxy in front of a real server that alters statements, so that the server lacks
exactly one capability. Those of SQLite alter the statements of a connection.
"""

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from service.db import migrations
from service.db.capabilities import postgresql, sqlite
from service.db.capabilities.capability import Capability
from service.db.capabilities.scratch import NoScratchSchema, scratch_schema
from service.db.capabilities.server import TESTED_VERSIONS, describe_server
from tests.support.altering_proxy import altering_proxy
from tests.support.engines import VERSIONS, engine
from tests.support.feed import Consumer
from tests.support.postgres import PostgresServer


def padded(old: str, new: str) -> Mapping[bytes, bytes]:
    """Return the change of one text to another, which is padded to the same length."""
    return {old.encode(): new.ljust(len(old)).encode()}


# By capability, changes each of which takes it away, with a part of the problem that is reported.
ON_POSTGRESQL: Mapping[str, Sequence[tuple[Mapping[bytes, bytes], str]]] = {
    "catalog": [(padded("PostgreSQL 1", "CockroachDB"), "Could not determine version")],
    "READ COMMITTED": [({}, "set default_transaction_isolation")],
    "prepared statements": [(padded("$1::bigint + 1", "$1::bigint + 7"), "instead of [2, 3, 3]")],
    "column types": [(padded("varchar(255)", "varchar(1)"), "value too long")],
    'COLLATE "C"': [(padded('COLLATE "C"', 'COLLATE "D"'), 'collation "D"')],
    "text functions": [(padded("octet_length", "bit_length"), "instead of '2 é 2 1'")],
    "exact microseconds": [
        # As before PostgreSQL 14: a double has 53 bits.
        (
            padded("extract(epoch FROM greatest(", "date_part('epoch', greatest("),
            "instead of 253402300799999999",
        )
    ],
    "keyset pages": [(padded("UNBOUNDED PRECEDING", "1 PRECEDING"), "returned '2,3,4' instead of '2,3'")],
    "arrays": [(padded("WITH ORDINALITY", ""), "2 columns specified")],
    "identity columns": [(padded("BY DEFAULT", "ALWAYS"), "cannot insert a non-DEFAULT value")],
    "sequences": [
        (
            padded("generate_series(1, 5", "generate_series(1, 4"),
            "five numbers drawn together are [1, 2, 3, 4]",
        ),
        (padded("< 100", "< 0  "), "after setval to 100 the next number is 6"),
    ],
    "RETURNING": [(padded("RETURNING version", ""), "syntax error")],
    "ON CONFLICT": [
        (padded("DO NOTHING", ""), "syntax error"),
        (padded("SET n = 2", "SET n = 3"), "DO UPDATE does not return the updated row"),
        (padded("(1, 1) ON CONFLICT DO N", "(2, 1) ON CONFLICT DO N"), "whether a row was inserted"),
    ],
    "foreign keys": [
        (padded("ON DELETE CASCADE", ""), "violates foreign key constraint"),
        (padded("(parent bigint REFERENCES", "(parent bigint) --"), "may refer to one that does not exist"),
    ],
    "savepoints": [(padded("ROLLBACK TO SAVEPOINT attempt", "COMMIT"), "the rows are 3 instead of 1,3")],
    "COPY in a transaction": [(padded("ROLLBACK;", "COMMIT;"), "ROLLBACK does not undo COPY")],
    "integrity errors of COPY": [
        (padded("bigint PRIMARY KEY", "bigint"), "a duplicate key in COPY is not an error")
    ],
    "UPDATE FROM arrays": [(padded("changed.id = new.id", "changed.id = 1"), "instead of '1 -,2 two'")],
    "table locks": [
        (padded("IN SHARE ROW EXCLUSIVE MODE", "IN ROW EXCLUSIVE MODE"), "does not wait for ROW EXCLUSIVE"),
        (padded("IN ROW EXCLUSIVE MODE", "IN EXCLUSIVE MODE"), "can't both hold ROW EXCLUSIVE"),
    ],
    "row locks": [
        (padded("FOR NO KEY UPDATE OF owner", ""), "UPDATE does not wait for FOR NO KEY UPDATE"),
        (padded("FOR NO KEY UPDATE OF owner", "FOR UPDATE OF owner"), "keeps others from inserting"),
        (padded("FOR UPDATE", ""), "UPDATE does not wait for FOR UPDATE"),
    ],
    "planner settings": [(padded("enable_hashjoin = off", "enable_hashjoin = on"), "instead of 'off off'")],
    "statement_timeout": [(padded("statement_timeout", "roster.statement_"), "runs on after its timeout")],
    "lock_timeout": [
        (padded("lock_timeout", "roster.lock_"), "no answer in 5 s"),
        (padded("SET n = 2", "SET n=n2"), "does not exist"),
    ],
    "idle_in_transaction_session_timeout": [
        (
            padded("idle_in_transaction_session_timeout", "roster.idle_in_transaction_session_"),
            "a transaction stays open after its timeout",
        )
    ],
    "transactional DDL": [(padded("ROLLBACK;", "COMMIT;"), "ROLLBACK does not undo ALTER TABLE")],
    "indexes built CONCURRENTLY": [
        (padded("CONCURRENTLY", "CONCURRENT"), "syntax error"),
        (padded("SELECT indisvalid", "SELECT false"), "the index is not valid"),
    ],
    "advisory locks": [
        (padded("pg_backend_pid()", "5"), "this is a pooler in transaction mode; set ROSTER_MIGRATION_URL"),
        (padded("pg_try_advisory_lock($1)", "$1::bigint > 0"), "does not keep another from its lock"),
    ],
    "statistics of sessions": [
        (padded("datname = current_database()", "datname = 'other'"), "instead of True")
    ],
    "cancelling a statement": [({b"\x04\xd2\x16\x2e": b"\x04\xd2\x16\x00"}, "no answer in 5 s")],
    "xid8 and snapshots": [(padded("xid8 DEFAULT", "xid9 DEFAULT"), 'type "xid9" does not exist')],
    "statement triggers with transition tables": [
        (padded("REFERENCING NEW TABLE", "REFERENCED NEW TABLE"), "syntax error"),
        (padded("AFTER INSERT", "AFTER UPDATE"), "of None bytes instead of [16]"),
    ],
    "pg_control_system": [(padded("pg_control_system", "pg_controlsystem"), "does not exist")],
    "WAL positions": [(padded("pg_walfile_name", "pg_walfilename"), "does not exist")],
    "replay positions": [(padded("pg_last_wal_replay_lsn", "pg_last_replay_lsn"), "does not exist")],
}
# What no change of a text can do.
PARAMETERS = {"READ COMMITTED": "?options=-cdefault_transaction_isolation=serializable"}


async def problems(url: str, capabilities: Sequence[Capability[Any]]) -> dict[str, str]:
    """Return the problems with capabilities, by name."""
    async with scratch_schema(url) as scratch:
        found = {each.name: await postgresql.problem_of(each, scratch) for each in capabilities}
    return {name: problem for name, problem in found.items() if problem}


@pytest.mark.parametrize("version", VERSIONS)
async def test_finds_everything_in_each_version_of_postgresql(version: str) -> None:
    """And drops its schema. The server has recovered from a crash: its replay position stays from then."""
    with PostgresServer(programs=engine(version)) as server:
        server.stop("immediate")
        server.start()
        url = server.url.render_as_string()
        described = await describe_server(url)
        assert described.description.startswith(f"PostgreSQL {version}.")
        assert described.is_tested

        assert await problems(url, postgresql.CAPABILITIES) == {}
        assert (await describe_server(url)).leftovers == []
        await check_feed(url)


async def check_feed(url: str) -> None:
    """Read changes of single rows, of many in one statement, and of rows that are deleted."""
    await asyncio.to_thread(migrations.upgrade, url)
    consumer = Consumer(url)
    token = await consumer.token()
    await consumer.execute(
        "INSERT INTO users (email) SELECT n FROM generate_series(1, 6) AS n",
        "DELETE FROM users WHERE id = 1",
        "UPDATE users SET version = 2 WHERE id > 4",
    )
    assert await consumer.changed_ids(token) == [1, 2, 3, 4, 5, 6]
    await consumer.execute("TRUNCATE users CASCADE")
    assert await consumer.is_reset(token)
    await consumer.close()


def test_the_same_versions_are_tested_and_documented() -> None:
    """By `roster doctor`, by the test above, and in the guide for operators."""
    page = (Path(__file__).parents[2] / "docs/operating.md").read_text()
    first, *others, last = VERSIONS

    assert [*map(int, VERSIONS)] == list(TESTED_VERSIONS)
    assert f"| PostgreSQL | {first} and newer | {', '.join([first, *others])} and {last} |" in page


def test_changes_take_every_capability_away() -> None:
    """A check that can't fail would say nothing."""
    assert list(ON_POSTGRESQL) == [capability.name for capability in postgresql.CAPABILITIES]


@pytest.mark.parametrize("capability", postgresql.CAPABILITIES, ids=lambda each: each.name)
async def test_finds_what_a_server_lacks(capability: Capability[Any], empty_postgresql_url: str) -> None:
    """By the answers, not by a version."""
    for changes, problem in ON_POSTGRESQL[capability.name]:
        async with altering_proxy(empty_postgresql_url, changes) as url:
            found = await problems(f"{url}{PARAMETERS.get(capability.name, '')}", [capability])
        assert problem in found.get(capability.name, "nothing"), changes


@pytest.mark.parametrize(
    "error", [ValueError(), ValueError("no number"), asyncpg.InternalClientError("got X")]
)
async def test_goes_on_after_any_error(error: Exception, empty_postgresql_url: str) -> None:
    """The driver may fail in any way at the answers of an engine; the error need not have a text."""

    async def check(scratch: Any) -> None:
        raise error

    capabilities = [Capability("first", "", check), Capability("second", "", check)]
    found = await problems(empty_postgresql_url, capabilities)

    assert list(found.values()) == [str(error) or "ValueError"] * 2


async def test_needs_transactions(empty_postgresql_url: str) -> None:
    """A pooler in statement mode refuses them, and nothing would work."""
    changes = {b"BEGIN\0": b"BEGAN\0"}
    async with altering_proxy(empty_postgresql_url, changes) as url:
        with pytest.raises(NoScratchSchema, match="no transaction can be opened"):
            await problems(url, [])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (padded("PostgreSQL 1", "CockroachDB"), "CockroachDB"),
        (padded("SELECT version()", "SELECT '11-YB-2'"), "YugabyteDB"),
    ],
)
async def test_names_an_engine_by_its_version(
    changes: Mapping[bytes, bytes], name: str, empty_postgresql_url: str
) -> None:
    """With the version of PostgreSQL that it claims."""
    async with altering_proxy(empty_postgresql_url, changes) as url:
        described = await describe_server(url)

    assert described.description.startswith(f"{name}, compatible with PostgreSQL ")
    assert not described.is_tested


async def test_names_aurora(empty_postgresql_url: str) -> None:
    """Its version is that of PostgreSQL, but it has a function of its own."""
    connection = await asyncpg.connect(empty_postgresql_url.replace("+asyncpg", ""))
    await connection.execute("CREATE FUNCTION aurora_version() RETURNS text LANGUAGE sql AS $$ SELECT '' $$")
    await connection.close()

    assert (await describe_server(empty_postgresql_url)).description.startswith("Aurora, compatible with")


def without(old: str, new: str = "") -> type[sqlite3.Connection]:
    """Return a connection to a SQLite that lacks what one text of its statements means."""

    class Altered(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace(old, new), *parameters)

    return Altered


class FewParameters(sqlite3.Connection):
    """A SQLite with the limit that it had before 3.32."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)


ON_SQLITE: Mapping[str, tuple[type[sqlite3.Connection], str]] = {
    "write-ahead log": (without("= WAL", "= DELETE"), "allows only the journal mode delete"),
    "locks": (without("BEGIN IMMEDIATE", "BEGIN"), "locks don't work on this file system"),
    "AUTOINCREMENT": (without("AUTOINCREMENT"), "no such table: sqlite_sequence"),
    "RETURNING": (without("RETURNING version"), "returned None instead of 2"),
    "ON CONFLICT": (without("ON CONFLICT DO NOTHING"), "UNIQUE constraint failed"),
    "foreign keys": (without("foreign_keys = ON", "foreign_keys = OFF"), "refer to one that does not exist"),
    "savepoints": (without("ROLLBACK TO SAVEPOINT attempt", "SELECT 1"), "the rows are [1, 2]"),
    "32,766 parameters": (FewParameters, "too many SQL variables"),
    "JSON functions": (without("json_each", "json_any"), "no such table: json_any"),
    "keyset pages": (without("UNBOUNDED", "0"), "instead of '2,3'"),
    "texts by code point": (without("TEXT)", "TEXT COLLATE NOCASE)"), "instead of 'B,a,é'"),
    "text functions": (without("AS BLOB", "AS TEXT"), "instead of '2 é 2'"),
    "exact microseconds": (without("%s", "%f"), "instead of 1709208000000001"),
    "transactional DDL": (without("ROLLBACK", "COMMIT"), "returned (1,) instead of 0"),
    "query_only": (without("query_only = ON", "query_only = OFF"), "reads can write"),
    "interrupt": (without("SELECT 1 FROM n", "SELECT 1 FROM n LIMIT 9"), "a statement runs on"),
}


def test_finds_everything_in_sqlite(tmp_path: Path) -> None:
    """And removes its folder."""
    with sqlite.scratch_folder(tmp_path) as scratch:
        found = [sqlite.problem_of(capability, scratch) for capability in sqlite.CAPABILITIES]

    assert found == [""] * len(sqlite.CAPABILITIES)
    assert list(tmp_path.iterdir()) == []
    assert list(ON_SQLITE) == [capability.name for capability in sqlite.CAPABILITIES]


@pytest.mark.parametrize("capability", sqlite.CAPABILITIES, ids=lambda each: each.name)
def test_finds_what_sqlite_lacks(capability: Capability[Any], tmp_path: Path) -> None:
    """Each check can fail."""
    connection, problem = ON_SQLITE[capability.name]

    assert problem in sqlite.problem_of(capability, sqlite.Scratch(tmp_path, connection))
