"""`roster doctor --database`: its output, its leftovers, and its errors if it can't probe."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

from service.db.capabilities import postgresql, sqlite
from tests.support.command import ROSTER, Ended, ended, run, start
from tests.support.pgbouncer import direct, pgbouncer
from tests.support.postgres import PostgresServer
from tests.support.rival import rival

# A table of the probe waits for the lock of a test.
WAITING_TABLE = """
    CREATE FUNCTION wait() RETURNS event_trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_advisory_xact_lock(1); END';
    CREATE EVENT TRIGGER wait ON ddl_command_start WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION wait();
"""
SCHEMAS = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'roster%'"
PROBES = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'roster doctor'"


async def probe(folder: Path, url: str = "", **environment: Any) -> Ended:
    """Run the command with the database of a URL."""
    return await run(ROSTER, "doctor", "--database", folder=folder, ROSTER_DATABASE_URL=url, **environment)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    """Yield a connection to the database of a URL."""
    connection = await asyncpg.connect(make_url(url).set(drivername="postgresql").render_as_string(False))
    try:
        yield connection
    finally:
        await connection.close()


async def fetch(url: str, query: str) -> list[Any]:
    """Return the first column of a query."""
    async with connected(url) as connection:
        return [row[0] for row in await connection.fetch(query)]


@asynccontextmanager
async def role(url: str, *rights: str) -> AsyncIterator[str]:
    """Yield the URL of a database for a new role with these rights."""
    name = f"{make_url(url).database}_role"
    async with connected(url) as connection:
        await connection.execute(f"CREATE ROLE {name} LOGIN")
        try:
            for right in rights:
                await connection.execute(right.format(role=name, database=make_url(url).database))
            yield make_url(url).set(username=name).render_as_string()
        finally:
            await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_reports_each_capability(empty_postgresql_url: str, tmp_path: Path) -> None:
    """An empty database will do."""
    result = await probe(tmp_path, empty_postgresql_url)

    names = [f"ok    engine    {capability.name}" for capability in postgresql.CAPABILITIES]
    settings, server, *found = result.out.splitlines()
    assert (result.status, result.err, found) == (0, "", names)
    assert settings.startswith("ok    settings  ")
    assert server.startswith("ok    engine    PostgreSQL 1")
    assert await fetch(empty_postgresql_url, SCHEMAS) == []


async def test_reports_each_capability_of_sqlite(tmp_path: Path) -> None:
    """It creates no database."""
    result = await probe(tmp_path)

    names = [f"ok    engine    {capability.name}" for capability in sqlite.CAPABILITIES]
    assert (result.status, result.err, result.out.splitlines()[2:]) == (0, "", names)
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240  (nothing else runs)


async def test_fails_without_what_roster_needs(empty_postgresql_url: str, tmp_path: Path) -> None:
    """All other checks are made; what is lost is named."""
    revoked = "REVOKE EXECUTE ON FUNCTION pg_try_advisory_lock(bigint) FROM PUBLIC"
    rights = ["GRANT CREATE ON DATABASE {database} TO {role}", revoked]
    async with role(empty_postgresql_url, *rights) as url:
        result = await probe(tmp_path, url)

    assert result.status == 1
    assert (
        "FAIL  engine    advisory locks: permission denied for function pg_try_advisory_lock\n"
        "                needed for `roster migrate` twice at the same time\n"
    ) in result.out
    assert result.out.count("ok    engine") == len(postgresql.CAPABILITIES)  # with the line of the server


async def test_warns_without_what_some_features_need(empty_postgresql_url: str, tmp_path: Path) -> None:
    """The exit status is 0."""
    rights = [
        "GRANT CREATE ON DATABASE {database} TO {role}",
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC",
        "REVOKE EXECUTE ON FUNCTION pg_current_wal_insert_lsn() FROM PUBLIC",
    ]
    async with role(empty_postgresql_url, *rights) as url:
        result = await probe(tmp_path, url)

    warned = [line for line in result.out.splitlines() if line.startswith("warn")]
    assert result.status == 0
    assert [line.split(":")[0] for line in warned] == [
        "warn  engine    pg_control_system",
        "warn  engine    WAL positions",
    ]


async def test_says_which_right_it_needs(empty_postgresql_url: str, tmp_path: Path) -> None:
    """The role of a service has no right to create anything."""
    async with role(empty_postgresql_url) as url:
        result = await probe(tmp_path, url)

    assert result.status == 1
    assert "nothing was probed, because this role may not create a schema" in result.out
    assert "GRANT CREATE ON DATABASE" in result.out


async def test_uses_the_role_of_migrations(empty_postgresql_url: str, tmp_path: Path) -> None:
    """It may create a schema."""
    async with role(empty_postgresql_url) as url:
        result = await probe(tmp_path, url, ROSTER_MIGRATION_URL=empty_postgresql_url)

    assert (result.status, "FAIL" in result.out) == (0, False)


async def test_reports_a_standby(tmp_path: Path) -> None:
    """It can't be written, so nothing can be tried."""
    with PostgresServer() as server:
        server.stop()
        (Path(server._folder) / "data/standby.signal").touch()
        server.start()
        result = await probe(tmp_path, server.url.render_as_string())

    assert result.status == 1
    assert "FAIL  engine    the database is read-only: it is a standby" in result.out


async def test_reports_an_unreachable_database(tmp_path: Path) -> None:
    """With the setting to check."""
    result = await probe(tmp_path, "postgresql://x@127.0.0.1:1/roster")

    assert result.status == 1
    assert "FAIL  engine    the database can't be reached" in result.out
    assert "check ROSTER_DATABASE_URL" in result.out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_drops_its_schema_if_it_is_interrupted(
    number: signal.Signals, status: int, empty_postgresql_url: str, tmp_path: Path
) -> None:
    """Even while a statement waits."""
    await execute(empty_postgresql_url, WAITING_TABLE)
    async with rival(empty_postgresql_url) as other:
        await other.execute("SELECT pg_advisory_xact_lock(1)")
        process = await start(
            ROSTER, "doctor", "--database", folder=tmp_path, ROSTER_DATABASE_URL=empty_postgresql_url
        )
        await other.wait_for_blocked()
        process.send_signal(number)
        result = await ended(process)

    assert result.status == status
    assert await fetch(empty_postgresql_url, SCHEMAS) == []


async def test_names_the_schema_of_a_killed_probe(empty_postgresql_url: str, tmp_path: Path) -> None:
    """It says how to drop it."""
    await execute(empty_postgresql_url, WAITING_TABLE)
    async with rival(empty_postgresql_url) as other:
        await other.execute("SELECT pg_advisory_xact_lock(1)")
        process = await start(
            ROSTER, "doctor", "--database", folder=tmp_path, ROSTER_DATABASE_URL=empty_postgresql_url
        )
        await other.wait_for_blocked()
        process.kill()
        await ended(process)
    [schema] = await fetch(empty_postgresql_url, SCHEMAS)
    await execute(empty_postgresql_url, "DROP EVENT TRIGGER wait")
    result = await probe(tmp_path, empty_postgresql_url)

    assert result.status == 0
    assert (
        f"warn  engine    the schema {schema} of a probe was not dropped; run DROP SCHEMA {schema} CASCADE"
        in result.out
    )
    await execute(empty_postgresql_url, f"DROP SCHEMA {schema} CASCADE")


async def test_names_the_folder_of_a_killed_probe(tmp_path: Path) -> None:
    """It removes only its own."""
    left = tmp_path / f"{sqlite.PREFIX}abc"
    await asyncio.to_thread(left.mkdir)
    result = await probe(tmp_path)

    assert f"warn  engine    {left} was left by a probe" in result.out
    assert result.status == 0


async def execute(url: str, statements: str) -> None:
    """Execute statements."""
    async with connected(url) as connection:
        await connection.execute(statements)


async def test_pooler_in_transaction_mode_can_not_migrate(empty_postgresql_url: str, tmp_path: Path) -> None:
    """The probe reports what `roster migrate` would lack; with a direct URL for it, nothing is missing."""
    server = direct(empty_postgresql_url)
    with pgbouncer(server) as pooler:
        pooled = await probe(tmp_path, pooler.url(server), ROSTER_DATABASE_POOLER="transaction")
        separate = await probe(tmp_path, pooler.url(server), ROSTER_MIGRATION_URL=server)

    failed = [line for line in pooled.out.splitlines() if line.startswith("FAIL")]
    assert (pooled.status, len(failed)) == (1, 1)
    assert "pooler in transaction mode; set ROSTER_MIGRATION_URL" in failed[0]
    assert (separate.status, separate.err) == (0, "")
    assert await fetch(server, SCHEMAS) == []
