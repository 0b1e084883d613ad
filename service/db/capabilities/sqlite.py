"""The capabilities that Roster needs from SQLite and the file system, and the probe that tries them.

The checks work on files in a folder next to the database: whether locks and the write-ahead log work depends
on the file system. Each has files of its own.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from service.db.bulk.sqlite import MAX_PARAMETERS
from service.db.capabilities.capability import Capability, Missing

PREFIX = "roster-probe-"
BUSY, CONSTRAINT = "SQLITE_BUSY", "SQLITE_CONSTRAINT"

Connect = Callable[..., sqlite3.Connection]


class Scratch:
    """A folder to try things in; each check gets a file of its own."""

    def __init__(self, folder: Path, connect: Connect = sqlite3.connect) -> None:
        self._folder = folder
        self._connect = connect
        self._files = 0

    def new_file(self) -> Path:
        """Return the path of a file that does not exist yet."""
        self._files += 1
        return self._folder / f"{self._files}.db"

    def open(self, file: Path) -> sqlite3.Connection:
        """Return a connection without implicit transactions, which does not wait for locks."""
        return self._connect(file, isolation_level=None, timeout=0)


Check = Callable[[Scratch], None]


def returns(expected: object, *statements: str) -> Check:
    """Return the check that the last statement returns a value."""

    def check(scratch: Scratch) -> None:
        with closing(scratch.open(scratch.new_file())) as connection:
            for statement in statements[:-1]:
                connection.execute(statement)
            row = connection.execute(statements[-1]).fetchone()
        _require(row == (expected,), f"{statements[-1]} returned {row} instead of {expected!r}")

    return check


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise Missing(problem)


def _fails(connection: sqlite3.Connection, statement: str, code: str) -> bool:
    """Return whether a statement ends with an error of this kind; False if it succeeds."""
    try:
        connection.execute(statement)
    except sqlite3.Error as error:
        if error.sqlite_errorname.startswith(code):
            return True
        raise
    return False


def _check_wal(scratch: Scratch) -> None:
    file = scratch.new_file()
    with closing(scratch.open(file)) as writer, closing(scratch.open(file)) as reader:
        mode = writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        _require(mode == "wal", f"the file system allows only the journal mode {mode}; use a local disk")
        writer.execute("CREATE TABLE t (id INTEGER)")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO t VALUES (1)")
        during = reader.execute("SELECT count(*) FROM t").fetchone()[0]
        writer.execute("COMMIT")
        after = reader.execute("SELECT count(*) FROM t").fetchone()[0]
    _require((during, after) == (0, 1), "a reader does not see what was committed last")


def _check_locks(scratch: Scratch) -> None:
    file = scratch.new_file()
    with closing(scratch.open(file)) as first, closing(scratch.open(file)) as second:
        first.execute("PRAGMA journal_mode = WAL")
        first.execute("BEGIN IMMEDIATE")
        is_locked = _fails(second, "BEGIN IMMEDIATE", BUSY)
        first.execute("ROLLBACK")
        _require(is_locked, "two writers at a time: locks don't work on this file system; use a local disk")
        second.execute("BEGIN IMMEDIATE")


def _check_foreign_keys(scratch: Scratch) -> None:
    with closing(scratch.open(scratch.new_file())) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        connection.execute("CREATE TABLE child (parent INTEGER REFERENCES parent ON DELETE CASCADE)")
        refuses = _fails(connection, "INSERT INTO child VALUES (1)", CONSTRAINT)
        connection.execute("INSERT INTO parent VALUES (1)")
        connection.execute("INSERT INTO child VALUES (1)")
        connection.execute("DELETE FROM parent")
        left = connection.execute("SELECT count(*) FROM child").fetchone()[0]
    _require(refuses, "a row may refer to one that does not exist")
    _require(left == 0, "ON DELETE CASCADE leaves rows")


def _check_query_only(scratch: Scratch) -> None:
    with closing(scratch.open(scratch.new_file())) as connection:
        connection.execute("PRAGMA query_only = ON")
        _require(_fails(connection, "CREATE TABLE t (id INTEGER)", "SQLITE_READONLY"), "reads can write")


def _check_parameters(scratch: Scratch) -> None:
    with closing(scratch.open(scratch.new_file())) as connection:
        marks = ",".join("?" * MAX_PARAMETERS)
        connection.execute(f"SELECT 1 WHERE 1 IN ({marks})", [1] * MAX_PARAMETERS)


def _check_interrupt(scratch: Scratch) -> None:
    endless = "WITH RECURSIVE n AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT count(*) FROM n"
    with closing(scratch.open(scratch.new_file())) as connection:
        # Called from the statement itself, in place of another thread's call.
        connection.set_progress_handler(connection.interrupt, 1000)
        _require(_fails(connection, endless, "SQLITE_INTERRUPT"), "a statement runs on")


def _check_savepoints(scratch: Scratch) -> None:
    with closing(scratch.open(scratch.new_file())) as connection:
        for statement in (
            "CREATE TABLE t (id INTEGER PRIMARY KEY)",
            "BEGIN IMMEDIATE",
            "INSERT INTO t VALUES (1)",
            "SAVEPOINT attempt",
            "INSERT INTO t VALUES (2)",
        ):
            connection.execute(statement)
        _fails(connection, "INSERT INTO t VALUES (1)", CONSTRAINT)
        connection.execute("ROLLBACK TO SAVEPOINT attempt")
        connection.execute("COMMIT")
        ids = [row[0] for row in connection.execute("SELECT id FROM t")]
    _require(ids == [1], f"after ROLLBACK TO SAVEPOINT the rows are {ids} instead of [1]")


USERS = (
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, email TEXT UNIQUE, version INTEGER DEFAULT 1)"
)
PAGE = """
    SELECT group_concat(id) FROM (
        SELECT id, count(*) OVER () AS total,
            sum(version) OVER (ORDER BY version, id ROWS UNBOUNDED PRECEDING) AS running
        FROM users WHERE (version, id) > (1, 1)
    ) WHERE running <= 2 AND total = 3
"""
MICROSECONDS = """
    SELECT strftime('%s', substr('2024-02-29 12:00:00.000001', 1, 19)) * 1000000
        + substr('2024-02-29 12:00:00.000001', 21)
"""

CAPABILITIES: Sequence[Capability[Check]] = (
    Capability("write-ahead log", "reads during writes", _check_wal),
    Capability("locks", "more than one process, such as a migration, or `roster doctor`", _check_locks),
    Capability(
        "AUTOINCREMENT",
        "ids that are never used again",
        returns(
            8,
            USERS,
            "INSERT INTO users (email) VALUES ('a')",
            "DELETE FROM users",
            "UPDATE sqlite_sequence SET seq = max(seq, 7) WHERE name = 'users'",
            "INSERT INTO users (email) VALUES ('b') RETURNING id",
        ),
    ),
    Capability(
        "RETURNING",
        "all writes",
        returns(
            2,
            USERS,
            "INSERT INTO users (email) VALUES ('a') RETURNING id",
            "UPDATE users SET version = version + 1 WHERE id = 1 RETURNING version",
            "DELETE FROM users RETURNING version",
        ),
    ),
    Capability(
        "ON CONFLICT",
        "CreateUser, request_id, and named loads",
        returns(
            0,
            USERS,
            "INSERT INTO users (email) VALUES ('a'), ('a') ON CONFLICT DO NOTHING",
            "SELECT count(*) - 1 FROM users",
        ),
    ),
    Capability("foreign keys", "CreatePost and DeleteUser", _check_foreign_keys),
    Capability("savepoints", "bulk loads", _check_savepoints),
    Capability("32,766 parameters", "bulk loads", _check_parameters),
    Capability(
        "JSON functions",
        "BatchGet methods, shared reads, and bulk loads",
        returns("[2,1]", """SELECT json_group_array(value) FROM json_each('[2,1]')"""),
    ),
    Capability(
        "keyset pages",
        "lists and exports",
        returns(
            "2,3",
            USERS,
            "INSERT INTO users (email) VALUES ('a'), ('b'), ('c')",
            "INSERT INTO users (email, version) VALUES ('d', 2)",
            PAGE,
        ),
    ),
    Capability(
        "texts by code point",
        "lists and filters",
        returns(
            "B,a,é",
            "CREATE TABLE sorted (t TEXT)",
            "INSERT INTO sorted VALUES ('é'), ('B'), ('a')",
            "SELECT group_concat(t) FROM (SELECT t FROM sorted ORDER BY t)",
        ),
    ),
    Capability(
        "text functions",
        "filters, and the limit on the size of an answer",
        returns(
            "2 é 2", "SELECT instr('aé', 'é') || ' ' || substr('aé', -1) || ' ' || length(CAST('é' AS BLOB))"
        ),
    ),
    Capability("exact microseconds", "all reads", returns(1_709_208_000_000_001, MICROSECONDS)),
    Capability(
        "transactional DDL",
        "migrations that are applied as a whole or not at all",
        returns(
            0,
            "BEGIN IMMEDIATE",
            "CREATE TABLE t (id INTEGER, gone INTEGER)",
            "ALTER TABLE t DROP COLUMN gone",
            "ROLLBACK",
            "SELECT count(*) FROM sqlite_schema",
        ),
    ),
    Capability("query_only", "reads that can't write", _check_query_only),
    Capability("interrupt", "the limit on the time of a call", _check_interrupt),
)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Scratch]:
    """Create a folder in the one of the database, and remove it however the block ends; raises OSError."""
    with TemporaryDirectory(prefix=PREFIX, dir=folder) as created:
        yield Scratch(Path(created))


def leftovers(folder: Path) -> list[Path]:
    """Return the folders of probes that were killed."""
    return sorted(folder.glob(f"{PREFIX}*"))


def problem_of(capability: Capability[Check], scratch: Scratch) -> str:
    """Return why SQLite, or the file system, lacks a capability; "" if it has it."""
    try:
        capability.check(scratch)
    except (Missing, sqlite3.Error, OSError) as error:
        return str(error)
    return ""
