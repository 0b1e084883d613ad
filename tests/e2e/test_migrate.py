"""`roster migrate` in two steps, and servers next to it."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service import __version__
from service.db import revisions
from tests.support.command import ROSTER, Ended, run, serving
from tests.support.migrations import migrate_as_old_release

HEAD = revisions.head()
PENDING = "once no older server runs, complete the upgrade to 0011 with `roster migrate --contract`"
SERVERS = "SELECT name, release, revision FROM roster_servers"
SERVER = """
    INSERT INTO roster_servers (id, name, release, revision, seen_at)
    VALUES (gen_random_uuid(), :name, '0.0.9', :revision, now() - CAST(:seconds AS int) * interval '1 s')
"""


@pytest.fixture
def url(empty_postgresql_url: str) -> str:
    """A database on PostgreSQL, which the previous release has migrated."""
    return empty_postgresql_url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, poolclass=NullPool)
    await migrate_as_old_release(engine)
    yield engine
    await engine.dispose()


async def rows(engine: AsyncEngine, statement: str) -> list[tuple[str, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(statement))]


async def add_server(engine: AsyncEngine, name: str, revision: str, seconds: int) -> None:
    """Add a server whose last heartbeat was some seconds ago."""
    async with engine.begin() as connection:
        row = {"name": name, "revision": revision, "seconds": seconds}
        await connection.execute(text(SERVER), row)


async def test_upgrade_waits_for_the_end_of_older_servers(
    url: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    """A server of this release runs on each revision from the last expanding one on."""

    async def roster(*arguments: str) -> Ended:
        return await run(ROSTER, *arguments, folder=tmp_path, ROSTER_DATABASE_URL=url)

    async with engine.connect() as old_server:
        await old_server.execute(text("SET application_name = 'roster'"))
        await old_server.commit()

        refused = await roster("migrate", "--contract")
        assert refused.status == 2
        assert "1 sessions with the application name 'roster' from 127.0.0.1" in refused.err
        assert (await roster("serve")).err.endswith(
            "the schema is at revision 0002, but this release needs revision 0010; "
            "run `roster migrate` with the same ROSTER_DATABASE_URL\n"
        )

        migrated = await roster("migrate")
        assert migrated.out.startswith("schema migrated from revision 0002 to 0010\n")
        assert PENDING in " ".join(migrated.out.split())
        again = await roster("migrate")
        assert again.out.startswith("no expanding migration is pending\n")
        assert PENDING in " ".join(again.out.split())

        await add_server(engine, "old-1/7", "0002", 20)
        await add_server(engine, "dead/7", "0002", 70)
        await add_server(engine, "new-1/7", HEAD, 20)
        refused = await roster("migrate", "--contract")
        assert refused.status == 2
        assert "server old-1/7 of release 0.0.9 (revision 0002)" in refused.err
        assert "application name 'roster'" in refused.err
        assert "dead/7" not in refused.err
        assert "new-1/7" not in refused.err
        assert await rows(engine, "SELECT version_num FROM roster_schema") == [("0010",)]

    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM roster_servers"))
    async with serving(tmp_path, ROSTER_DATABASE_URL=url):
        doctor = await run(
            ROSTER, "doctor", folder=tmp_path, ROSTER_DATABASE_URL=url, ROSTER_LISTEN="127.0.0.1:0"
        )
        assert (doctor.status, PENDING in doctor.out) == (0, True)
        completed = await roster("migrate", "--contract")
        assert completed == Ended(0, "schema migrated from revision 0010 to 0011\n", "")
    async with serving(tmp_path, ROSTER_DATABASE_URL=url):
        pass


async def test_server_shows_itself_while_it_runs(url: str, engine: AsyncEngine, tmp_path: Path) -> None:
    """By a row, and by the name of its sessions."""
    await run(ROSTER, "migrate", folder=tmp_path, ROSTER_DATABASE_URL=url)
    async with serving(tmp_path, ROSTER_DATABASE_URL=url) as server:
        found: list[tuple[str, ...]] = []
        while not found:
            found = await rows(engine, SERVERS)
        sessions = await rows(
            engine,
            "SELECT DISTINCT application_name FROM pg_stat_activity WHERE application_name LIKE 'ros%'",
        )
        server.signal(signal.SIGTERM)
        assert (await server.ended()).status == 0

    [(name, release, revision)] = found
    assert (name.rpartition("/")[2], release, revision) == (str(server.pid), __version__, HEAD)
    assert sessions == [(f"roster {HEAD}",)]
    assert await rows(engine, SERVERS) == []


@pytest.mark.parametrize(("min_revision", "status"), [(HEAD, 0), ("9998", 2)])
async def test_newer_schema_may_admit_this_release(
    min_revision: str, status: int, sqlite_url: str, tmp_path: Path
) -> None:
    """Then `migrate` has nothing to do, and the embedded SQLite is served as it is."""
    engine = create_async_engine(sqlite_url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE roster_schema SET version_num = '9999'"))
        await connection.execute(text(f"UPDATE schema_compatibility SET min_revision = '{min_revision}'"))
    migrated = await run(ROSTER, "migrate", folder=tmp_path, ROSTER_DATABASE_URL=sqlite_url)
    assert migrated.status == status
    if status == 0:
        assert "which is newer than this release, but compatible" in migrated.out
        async with serving(tmp_path, ROSTER_DATABASE_URL=sqlite_url):
            pass
    else:
        refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=sqlite_url)
        assert refused.status == status
        assert "which is newer than this release and not compatible with it" in refused.err
    assert await rows(engine, "SELECT version_num FROM roster_schema") == [("9999",)]
    await engine.dispose()


async def test_migrates_at_the_url_for_migrations(url: str, engine: AsyncEngine, tmp_path: Path) -> None:
    """Which may be in a file; the other one is not used."""
    (tmp_path / "url").write_text(f"{url}\n")
    migrated = await run(
        ROSTER,
        "migrate",
        folder=tmp_path,
        ROSTER_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none",
        ROSTER_MIGRATION_URL_FILE=f"{tmp_path}/url",
    )
    assert migrated.out.startswith("schema migrated from revision 0002 to 0010\n")
