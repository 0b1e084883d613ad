"""The capabilities that Roster needs from PostgreSQL.

Each check has connections of its own, works in a scratch schema, and leaves nothing behind: one that fails
affects no other. In statements, `scratch.` stands for the schema. What blocks is tried with a second
connection, which must run into `lock_timeout`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from secrets import token_hex
from uuid import UUID

import asyncpg
from sqlalchemy import inspect

from service.db.capabilities.capability import Capability, Missing
from service.db.capabilities.scratch import PREFIX, SHORT_TIMEOUT, TIMEOUT_SECONDS, Scratch
from service.db.errors import cause_of
from service.db.migrations import migration_engine

CHECK_SECONDS = 30.0

# https://www.postgresql.org/docs/current/errcodes-appendix.html
UNIQUE_VIOLATION, FOREIGN_KEY_VIOLATION = "23505", "23503"
QUERY_CANCELED = "57014"

Check = Callable[[Scratch], Awaitable[None]]


def returns(expected: object, *statements: str) -> Check:
    """Return the check that the last statement of a transaction returns a value."""

    async def check(scratch: Scratch) -> None:
        async with scratch.session() as session, session.driver.transaction():
            await session.run(*statements[:-1])
            found = await session.value(statements[-1])
        if found != expected:
            raise Missing(f"{' '.join(statements[-1].split())} returned {found!r} instead of {expected!r}")

    return check


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise Missing(problem)


async def _check_dialect(scratch: Scratch) -> None:
    """Connect as the service does, and read the catalog as it does at its start."""
    async with scratch.session() as session:
        await session.run("CREATE TABLE scratch.dialect (id bigint PRIMARY KEY)")
    try:
        async with migration_engine(scratch.url).connect() as connection:
            columns = await connection.run_sync(
                lambda sync: inspect(sync).get_columns("dialect", schema=scratch.schema)
            )
    except AssertionError as error:  # SQLAlchemy's, of a version that it can't parse
        raise Missing(str(error)) from error
    _require([column["name"] for column in columns] == ["id"], "the catalog does not list a new table")


async def _check_read_committed(scratch: Scratch) -> None:
    async with scratch.session() as session, scratch.session() as other, session.driver.transaction():
        await other.run("CREATE TABLE scratch.committed (id bigint)")
        before = await session.value("SELECT count(*) FROM scratch.committed")
        await other.run("INSERT INTO scratch.committed VALUES (1)")
        after = await session.value("SELECT count(*) FROM scratch.committed")
    _require(
        (before, after) == (0, 1),
        "a statement does not see what was committed before it; set default_transaction_isolation to "
        "'read committed'",
    )


async def _check_ddl(scratch: Scratch) -> None:
    async with scratch.session() as session:
        await session.run("CREATE TABLE scratch.altered (id bigint, CONSTRAINT once UNIQUE (id))")
        transaction = session.driver.transaction()
        await transaction.start()
        await session.run(
            "ALTER TABLE scratch.altered DROP CONSTRAINT once",
            "ALTER TABLE scratch.altered ADD COLUMN version bigint NOT NULL DEFAULT 1",
        )
        await transaction.rollback()
        columns = await session.value(
            "SELECT count(*) FROM pg_attribute WHERE attrelid = 'scratch.altered'::regclass AND attnum > 0"
        )
        await session.run("INSERT INTO scratch.altered VALUES (1)")
        is_unique = await session.fails("INSERT INTO scratch.altered VALUES (1)", UNIQUE_VIOLATION)
    _require(is_unique and columns == 1, "ROLLBACK does not undo ALTER TABLE")


async def _check_concurrent_index(scratch: Scratch) -> None:
    async with scratch.session() as session:
        await session.run(
            "CREATE TABLE scratch.indexed (a bigint, b bigint)",
            "CREATE UNIQUE INDEX CONCURRENTLY measured ON scratch.indexed (a, b)",
        )
        is_valid = await session.value(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('scratch.measured')"
        )
        await session.run("DROP INDEX CONCURRENTLY IF EXISTS scratch.measured")
    _require(is_valid, "the index is not valid after it was built")


async def _check_advisory_locks(scratch: Scratch) -> None:
    key = int(token_hex(7), 16)  # of this probe only: behind a pooler the lock may outlive it
    async with scratch.session() as session, scratch.session() as other:
        sessions = [await each.value("SELECT pg_backend_pid()") for each in (session, other)]
        _require(
            sessions[0] != sessions[1],
            "two connections share a session, so this is a pooler in transaction mode; set "
            "ROSTER_MIGRATION_URL to the database itself, and ROSTER_DATABASE_POOLER=transaction",
        )
        is_first = await session.value("SELECT pg_try_advisory_lock($1)", key)
        is_second = await other.value("SELECT pg_try_advisory_lock($1)", key)
        was_held = await session.value("SELECT pg_advisory_unlock($1)", key)
        is_free = await other.value("SELECT pg_try_advisory_lock($1)", key)
    _require(
        (is_first, is_second, was_held, is_free) == (True, False, True, True),
        "a session does not keep another from its lock until it unlocks",
    )


async def _check_prepared_statements(scratch: Scratch) -> None:
    name = f"{PREFIX}{token_hex(8)}"
    async with scratch.session() as session, session.driver.transaction():
        named = await session.driver.prepare("SELECT $1::bigint + 1", name=name)
        unnamed = await session.driver.prepare("SELECT $1::bigint + 2")
        found = [await named.fetchval(1), await unnamed.fetchval(1), await named.fetchval(2)]
        await session.run(f"DEALLOCATE {name}")  # behind a pooler it would stay
    _require(found == [2, 3, 3], f"prepared statements returned {found} instead of [2, 3, 3]")


async def _check_copy(scratch: Scratch) -> None:
    async with scratch.session() as session:
        await session.run(
            'CREATE TABLE scratch.copied (id bigint, t text COLLATE "C", b boolean, at timestamptz)'
        )
        transaction = session.driver.transaction()
        await transaction.start()
        line = "1\ta\\tb\tt\t2024-02-29T12:00:00.000001+00:00\n2\t\\N\tf\t2024-02-29T12:00:00+00:00\n"
        await session.copy("copied", line, ["id", "t", "b", "at"])
        copied = await session.value(
            "SELECT string_agg(id || coalesce(t, '-'), ',' ORDER BY id) FROM scratch.copied"
        )
        await transaction.rollback()
        left = await session.value("SELECT count(*) FROM scratch.copied")
    _require(copied == "1a\tb,2-", "COPY stored something else than it was sent")
    _require(left == 0, "ROLLBACK does not undo COPY")


async def _check_copy_errors(scratch: Scratch) -> None:
    async with scratch.session() as session:
        await session.run(
            "CREATE TABLE scratch.unique_copied (id bigint PRIMARY KEY)",
            "INSERT INTO scratch.unique_copied VALUES (1)",
        )
        with suppress(asyncpg.IntegrityConstraintViolationError):
            await session.copy("unique_copied", "1\n", ["id"])
            raise Missing("a duplicate key in COPY is not an error")


async def _check_savepoints(scratch: Scratch) -> None:
    async with scratch.session() as session:
        await session.run("CREATE TABLE scratch.saved (id bigint PRIMARY KEY)")
        async with session.driver.transaction():
            await session.run("INSERT INTO scratch.saved VALUES (1)", "SAVEPOINT attempt")
            await session.run("INSERT INTO scratch.saved VALUES (2)")
            await session.fails("INSERT INTO scratch.saved VALUES (1)", UNIQUE_VIOLATION)
            await session.run("ROLLBACK TO SAVEPOINT attempt", "INSERT INTO scratch.saved VALUES (3)")
        ids = await session.value("SELECT string_agg(id::text, ',' ORDER BY id) FROM scratch.saved")
    _require(ids == "1,3", f"after ROLLBACK TO SAVEPOINT the rows are {ids} instead of 1,3")


async def _check_sequences(scratch: Scratch) -> None:
    """Draw ids and move the sequence as `service.db.bulk.postgresql` does."""
    sequence = "pg_get_serial_sequence('scratch.drawn', 'id')::regclass"
    async with scratch.session() as session, scratch.session() as other:
        await session.run("CREATE TABLE scratch.drawn (id bigint GENERATED BY DEFAULT AS IDENTITY)")
        none = await session.value(f"SELECT pg_sequence_last_value({sequence})")
        drawn = f"SELECT nextval((SELECT {sequence})) FROM generate_series(1, 5::bigint)"  # noqa: S608
        ids = await session.value(f"SELECT array_agg(id) FROM ({drawn}) AS drawn (id)")  # noqa: S608
        await session.run(
            f"SELECT setval({sequence}, 100) WHERE coalesce(pg_sequence_last_value({sequence}), 0) < 100"
        )
        following = await other.value("INSERT INTO scratch.drawn DEFAULT VALUES RETURNING id")
    _require((none, ids) == (None, [1, 2, 3, 4, 5]), f"five numbers drawn together are {ids}")
    _require(following == 101, f"after setval to 100 the next number is {following}")  # noqa: PLR2004


async def _check_table_locks(scratch: Scratch) -> None:
    async with scratch.session() as session, scratch.session() as other, session.driver.transaction():
        await other.run("CREATE TABLE scratch.locked (id bigint)")
        await session.run("LOCK TABLE scratch.locked IN ROW EXCLUSIVE MODE")
        draws = await other.waits("LOCK TABLE scratch.locked IN ROW EXCLUSIVE MODE")
        restores = await other.waits("LOCK TABLE scratch.locked IN SHARE ROW EXCLUSIVE MODE")
    _require(not draws, "two transactions can't both hold ROW EXCLUSIVE")
    _require(restores, "SHARE ROW EXCLUSIVE does not wait for ROW EXCLUSIVE")


async def _check_row_locks(scratch: Scratch) -> None:
    async with scratch.session() as session, scratch.session() as other:
        await session.run(
            "CREATE TABLE scratch.owner (id bigint PRIMARY KEY, name text)",
            "CREATE TABLE scratch.owned (owner bigint REFERENCES scratch.owner)",
            "INSERT INTO scratch.owner VALUES (1), (2)",
        )
        async with session.driver.transaction():
            await session.run(
                "SELECT owner.id FROM scratch.owner JOIN unnest(ARRAY[1]) AS wanted ON wanted = id "
                "ORDER BY owner.id FOR NO KEY UPDATE OF owner",
                "SELECT id FROM scratch.owner WHERE id = 2 FOR UPDATE",
            )
            updates = await other.waits("UPDATE scratch.owner SET name = 'x' WHERE id = 1")
            inserts = await other.waits("INSERT INTO scratch.owned VALUES (1)")
            updates_locked = await other.waits("UPDATE scratch.owner SET name = 'x' WHERE id = 2")
            reads = await other.waits("SELECT * FROM scratch.owner")
    _require(updates, "UPDATE does not wait for FOR NO KEY UPDATE")
    _require(not inserts, "FOR NO KEY UPDATE keeps others from inserting rows that refer to the locked one")
    _require(updates_locked, "UPDATE does not wait for FOR UPDATE")
    _require(not reads, "locked rows can't be read")


async def _check_on_conflict(scratch: Scratch) -> None:
    insert = "INSERT INTO scratch.conflicting VALUES (1, 1) ON CONFLICT DO NOTHING RETURNING id"
    upsert = (
        "INSERT INTO scratch.conflicting VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET n = 2 "
        "RETURNING conflicting.n"
    )
    async with scratch.session() as session, scratch.session() as other:
        await session.run("CREATE TABLE scratch.conflicting (id bigint PRIMARY KEY, n bigint)")
        async with session.driver.transaction():
            first = await session.value(insert)
            waits = await other.waits(insert)
        second, updated = await session.value(insert), await session.value(upsert)
    _require((first, second) == (1, None), "DO NOTHING RETURNING does not report whether a row was inserted")
    _require(waits, "INSERT does not wait for another transaction with the same key")
    _require(updated == 2, "DO UPDATE does not return the updated row")  # noqa: PLR2004


async def _check_foreign_keys(scratch: Scratch) -> None:
    async with scratch.session() as session:
        await session.run(
            "CREATE TABLE scratch.parent (id bigint PRIMARY KEY)",
            "CREATE TABLE scratch.child (parent bigint REFERENCES scratch.parent ON DELETE CASCADE)",
            "INSERT INTO scratch.parent VALUES (1)",
            "INSERT INTO scratch.child VALUES (1)",
        )
        refuses = await session.fails("INSERT INTO scratch.child VALUES (2)", FOREIGN_KEY_VIOLATION)
        await session.run("DELETE FROM scratch.parent")
        left = await session.value("SELECT count(*) FROM scratch.child")
    _require(refuses, "a row may refer to one that does not exist")
    _require(left == 0, "ON DELETE CASCADE leaves rows")


async def _check_statement_timeout(scratch: Scratch) -> None:
    async with scratch.session() as session, session.driver.transaction():
        await session.run(f"SET LOCAL statement_timeout = '{SHORT_TIMEOUT}'")
        ends = await session.fails(f"SELECT pg_sleep({TIMEOUT_SECONDS / 2})", QUERY_CANCELED)
    _require(ends, "a statement runs on after its timeout")


async def _check_lock_timeout(scratch: Scratch) -> None:
    async with scratch.session() as session, scratch.session() as other:
        await session.run("CREATE TABLE scratch.awaited (n bigint)", "INSERT INTO scratch.awaited VALUES (1)")
        async with session.driver.transaction():
            await session.run("UPDATE scratch.awaited SET n = 2")
            ends = await other.waits("UPDATE scratch.awaited SET n = 3")
    _require(ends, "a statement does not wait for another transaction")


async def _check_idle_timeout(scratch: Scratch) -> None:
    async with scratch.session() as session:
        ended = asyncio.Event()
        session.driver.add_termination_listener(lambda _: ended.set())
        await session.run("BEGIN", f"SET LOCAL idle_in_transaction_session_timeout = '{SHORT_TIMEOUT}'")
        try:
            await asyncio.wait_for(ended.wait(), TIMEOUT_SECONDS / 2)
        except TimeoutError:
            raise Missing("a transaction stays open after its timeout") from None


async def _check_cancel(scratch: Scratch) -> None:
    async with scratch.session() as session:
        with suppress(TimeoutError):
            await session.driver.fetchval(f"SELECT pg_sleep({TIMEOUT_SECONDS * 2})", timeout=0.1)
        _require(not session.driver.is_closed(), "cancelling a statement closes the connection")
        await session.value("SELECT 1")  # waits until the cancelled statement has ended


async def _check_types(scratch: Scratch) -> None:
    """Send and receive values of all types of columns."""
    at = datetime(2024, 2, 29, 12, 0, 0, 1, tzinfo=UTC)
    sent = (UUID(int=1), b"\0\xff", True, 2, (1 << 63) - 1, "é\U0001f600", at)
    async with scratch.session() as session:
        await session.run(
            "CREATE TABLE scratch.typed (a uuid, b bytea, c boolean, d smallint, e bigint, "
            'f varchar(255) COLLATE "C", g timestamptz DEFAULT now())'
        )
        returned = await session.driver.fetchrow(
            session.named("INSERT INTO scratch.typed VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING *"), *sent
        )
    _require(tuple(returned) == sent, f"the values {sent} came back as {tuple(returned)}")


PAGE = """
    SELECT string_agg(id::text, ',' ORDER BY id) FROM (
        SELECT id, count(*) OVER () AS total,
            sum(size) OVER (ORDER BY at, id ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS running
        FROM scratch.keyed WHERE (at, id) > (1, 1)
    ) AS candidates WHERE running <= 20 AND total = 3
"""
LOOK_UP = """
    SELECT array_agg(found ORDER BY position) FROM (
        SELECT position, (SELECT id FROM scratch.stored WHERE email = wanted.value) AS found
        FROM unnest(CAST('{b,c,a}' AS text[])) WITH ORDINALITY AS wanted (value, position)
    ) AS looked_up
"""
UPDATE_MANY = """
    UPDATE scratch.changed AS changed SET name = new.name
    FROM unnest(CAST('{2,1}' AS bigint[]), CAST('{two,NULL}' AS text[])) AS new (id, name)
    WHERE changed.id = new.id
"""
# Microseconds beyond the 53 bits of a double: `extract` returns an exact numeric since PostgreSQL 14.
MICROSECONDS = """
    SELECT (extract(epoch FROM greatest(
        least(timestamptz 'infinity', timestamptz '9999-12-31 23:59:59.999999+00'),
        timestamptz '0001-01-01 00:00:00+00'
    )) * 1000000)::bigint
"""
SINCE_SNAPSHOT = """
    SELECT xid >= pg_snapshot_xmax(token) OR xid = ANY (ARRAY(SELECT pg_snapshot_xip(token)))
    FROM scratch.logged, CAST($1::text AS pg_snapshot) AS token
"""


async def _check_snapshots(scratch: Scratch) -> None:
    """Find a transaction by a snapshot in which it was running, but not by a later one."""
    async with scratch.session() as session, scratch.session() as other:
        await session.run("CREATE TABLE scratch.logged (xid xid8 DEFAULT pg_current_xact_id())")
        async with session.driver.transaction():
            await session.run("INSERT INTO scratch.logged DEFAULT VALUES")
            before = await other.value("SELECT pg_current_snapshot()::text")
        after = await other.value("SELECT pg_current_snapshot()::text")
        found = [await other.value(SINCE_SNAPSHOT, token) for token in (before, after)]
    _require(found == [True, False], "a snapshot does not show which transactions have ended since")


LOG_INSERTED = """
    CREATE FUNCTION scratch.log_inserted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
    BEGIN
        PERFORM set_config('search_path', quote_ident(TG_TABLE_SCHEMA), true);
        INSERT INTO entries SELECT string_agg(int8send(id), '') FROM inserted;
        RETURN NULL;
    END $$
"""


async def _check_triggers(scratch: Scratch) -> None:
    """Log the rows of a statement in one entry, in the schema of their table."""
    async with scratch.session() as session:
        await session.run(
            "CREATE TABLE scratch.entries (ids bytea)",
            "CREATE TABLE scratch.watched (id bigint)",
            LOG_INSERTED,
            "CREATE TRIGGER log_inserted AFTER INSERT ON scratch.watched REFERENCING NEW TABLE AS inserted "
            "FOR EACH STATEMENT EXECUTE FUNCTION scratch.log_inserted()",
            "INSERT INTO scratch.watched VALUES (1), (2)",
        )
        entries = await session.value("SELECT array_agg(octet_length(ids)) FROM scratch.entries")
    _require(
        entries == [16], f"a statement of two rows has logged entries of {entries} bytes instead of [16]"
    )


WRITES, LOADS, MIGRATIONS = "all writes", "bulk loads", "`roster migrate`"
FEED, REPLICAS = "the change feed", "reads from replicas that see a caller's own writes"

CAPABILITIES: Sequence[Capability[Check]] = (
    Capability("catalog", "starting, and `roster migrate`", _check_dialect),
    Capability("READ COMMITTED", WRITES, _check_read_committed),
    Capability("prepared statements", "all reads and writes", _check_prepared_statements),
    Capability("column types", "all reads and writes", _check_types),
    Capability(
        'COLLATE "C"',
        "lists and filters that sort and compare texts by code point",
        returns(
            "B,a,é",
            'CREATE TABLE scratch.sorted (t text COLLATE "C")',
            "INSERT INTO scratch.sorted VALUES ('é'), ('B'), ('a')",
            "SELECT string_agg(t, ',' ORDER BY t) FROM scratch.sorted",
        ),
    ),
    Capability(
        "text functions",
        "filters, and the limit on the size of an answer",
        returns(
            "2 é 2 1",
            "SELECT concat_ws(' ', strpos('aé', 'é'), right('aé', 1), octet_length('é'), length('a'::bytea))",
        ),
    ),
    Capability("exact microseconds", "all reads", returns(253_402_300_799_999_999, MICROSECONDS)),
    Capability(
        "keyset pages",
        "lists and exports",
        returns(
            "2,3",
            "CREATE TABLE scratch.keyed (id bigint, at bigint, size bigint)",
            "INSERT INTO scratch.keyed VALUES (1, 1, 5), (2, 1, 10), (3, 2, 10), (4, 2, 10)",
            PAGE,
        ),
    ),
    Capability(
        "arrays",
        "BatchGet methods, shared reads, and bulk loads",
        returns(
            [2, None, 1],
            'CREATE TABLE scratch.stored (id bigint, email text COLLATE "C")',
            "INSERT INTO scratch.stored VALUES (1, 'a'), (2, 'b')",
            LOOK_UP,
        ),
    ),
    Capability(
        "identity columns",
        WRITES,
        returns(
            "1,7,2",
            "CREATE TABLE scratch.identified (id bigint GENERATED BY DEFAULT AS IDENTITY, n bigint)",
            "INSERT INTO scratch.identified (n) VALUES (1)",
            "INSERT INTO scratch.identified (id, n) VALUES (7, 2)",
            "INSERT INTO scratch.identified (n) VALUES (3)",
            "SELECT string_agg(id::text, ',' ORDER BY n) FROM scratch.identified",
        ),
    ),
    Capability("sequences", "bulk loads and restores", _check_sequences),
    Capability(
        "RETURNING",
        WRITES,
        returns(
            "2",
            "CREATE TABLE scratch.returned (id bigint, version bigint DEFAULT 1)",
            "INSERT INTO scratch.returned (id) VALUES (1) RETURNING version",
            "UPDATE scratch.returned SET version = version + 1 WHERE id = 1 RETURNING version",
            "DELETE FROM scratch.returned RETURNING version::text",
        ),
    ),
    Capability("ON CONFLICT", "CreateUser, request_id, and named loads", _check_on_conflict),
    Capability("foreign keys", "CreatePost and DeleteUser", _check_foreign_keys),
    Capability("savepoints", LOADS, _check_savepoints),
    Capability("COPY in a transaction", LOADS, _check_copy),
    Capability("integrity errors of COPY", "bulk loads with rows that are in conflict", _check_copy_errors),
    Capability(
        "UPDATE FROM arrays",
        "bulk updates",
        returns(
            "1 -,2 two",
            "CREATE TABLE scratch.changed (id bigint, name text)",
            "INSERT INTO scratch.changed VALUES (1, 'one'), (2, '')",
            UPDATE_MANY,
            "SELECT string_agg(id || ' ' || coalesce(name, '-'), ',' ORDER BY id) FROM scratch.changed",
        ),
    ),
    Capability("table locks", "restores during other loads", _check_table_locks),
    Capability("row locks", "bulk updates and named loads", _check_row_locks),
    Capability(
        "planner settings",
        LOADS,
        returns(
            "off off",
            "SET LOCAL enable_mergejoin = off",
            "SET LOCAL enable_hashjoin = off",
            "SELECT concat_ws(' ', current_setting('enable_mergejoin'), current_setting('enable_hashjoin'))",
        ),
    ),
    Capability("statement_timeout", "the limit on the time of a call", _check_statement_timeout),
    Capability("lock_timeout", "bulk loads and migrations that don't block others", _check_lock_timeout),
    Capability(
        "idle_in_transaction_session_timeout",
        "releasing the locks of a server that is gone",
        _check_idle_timeout,
    ),
    Capability("transactional DDL", MIGRATIONS, _check_ddl),
    Capability("indexes built CONCURRENTLY", MIGRATIONS, _check_concurrent_index),
    Capability("advisory locks", "`roster migrate` twice at the same time", _check_advisory_locks),
    Capability(
        "statistics of sessions",
        "`roster migrate`, which names the sessions that block it, and servers of older releases",
        returns(
            True,
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)",
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = current_setting('application_name')",
        ),
        is_required=False,
    ),
    Capability(
        "cancelling a statement",
        "ending the reads of callers who have left",
        _check_cancel,
        is_required=False,
    ),
    Capability(
        "xid8 and snapshots",
        FEED,
        _check_snapshots,
        is_required=False,
    ),
    Capability(
        "statement triggers with transition tables",
        FEED,
        _check_triggers,
        is_required=False,
    ),
    Capability(
        "pg_control_system",
        f"{FEED}, and {REPLICAS}",
        returns(True, "SELECT system_identifier IS NOT NULL FROM pg_control_system()"),
        is_required=False,
    ),
    Capability(
        "WAL positions",
        f"{FEED}, and {REPLICAS}",
        returns(True, "SELECT pg_walfile_name(pg_current_wal_insert_lsn()) ~ '^[0-9A-F]{24}$'"),
        is_required=False,
    ),
    Capability(
        "replay positions",
        REPLICAS,
        # A primary has one if it was promoted, or has recovered from a crash.
        returns(True, "SELECT coalesce(pg_last_wal_replay_lsn(), '0/1') > '0/0'"),
        is_required=False,
    ),
)


async def problem_of(capability: Capability[Check], scratch: Scratch) -> str:
    """Return why a server lacks a capability; "" if it has it."""
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await capability.check(scratch)
    except Missing as error:
        return str(error)
    except TimeoutError:
        return f"no answer in {TIMEOUT_SECONDS:.0f} s"
    except Exception as error:  # noqa: BLE001  (an engine may answer anything, and the other checks go on)
        return cause_of(error) if str(error) else type(error).__name__
    return ""
