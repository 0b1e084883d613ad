"""Failovers in the middle of a migration: the next run, on the new primary, completes it."""

import asyncio
import os
import sys
from random import Random
from typing import Any

import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import conninfo
from service.db.connect import connect
from tests.faults.histories import SEED
from tests.support.migrations import execute, migrate_as_old_release, upgrade
from tests.support.replication import Cluster

# Migrates; waits for a line of standard input before the statement or commit of this number.
HALTING = """
import sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from service.db import migrations

def halt(*arguments):
    global last
    is_read = len(arguments) > 2 and arguments[2].lstrip().upper().startswith("SELECT")
    last -= not is_read
    if not last and not is_read:
        print("halted", flush=True)
        sys.stdin.readline()

last = int(sys.argv[2])
event.listen(Engine, "before_cursor_execute", halt)
event.listen(Engine, "commit", halt)
migrations.upgrade(sys.argv[1])
"""
STATEMENTS = 16  # at least this number change something
POINTS = STATEMENTS if os.environ.get("ROSTER_TEST_FAILOVERS") else 2
INSERT = "INSERT INTO bulk_loads (load_id, caller, method, options) VALUES (:name, 'ada', 'm', '')"
BUILDING = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CREATE UNIQUE INDEX CONCURRENTLY%'"
INVALID = "SELECT count(*) FROM pg_index WHERE NOT (indisvalid AND indisready AND indislive)"
DESCRIPTION = """
    SELECT table_name || '.' || column_name,
        concat_ws(' ', data_type, character_maximum_length, is_nullable, column_default, is_identity)
    FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    ORDER BY 1, 2
"""


async def fetch(url: str, query: str) -> list[Any]:
    """Return the rows of a query on the primary."""
    connection = await connect(conninfo.read(f"{url}?target_session_attrs=primary", {}), timeout=10)
    try:
        return list(map(tuple, await connection.fetch(query)))
    finally:
        await connection.close()


async def old_database(cluster: Cluster, name: str) -> str:
    """Create a database as the previous release left it, and return its URL."""
    await fetch(cluster.url(), f"CREATE DATABASE {name}")
    engine = engine_of(cluster, name)
    await migrate_as_old_release(engine)
    await execute(engine, INSERT, name="nightly")
    await engine.dispose()
    return cluster.url(database=name)


def engine_of(cluster: Cluster, database: str) -> AsyncEngine:
    """Return an engine for a database of the primary."""
    return create_async_engine(cluster.primary.url.set(database=database), poolclass=NullPool)


async def start(url: str, halt_before: int) -> asyncio.subprocess.Process:
    """Start a migration."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HALTING, url, str(halt_before)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def fail_over(cluster: Cluster) -> None:
    """Kill the primary, and promote the standby."""
    await asyncio.to_thread(cluster.primary.kill)
    await cluster.promote(cluster.standbys[0])


async def check(url: str, undisturbed: str) -> None:
    """Complete a migration, and compare the schema with that of one without a failover."""
    await upgrade(url)
    assert await fetch(url, DESCRIPTION) == await fetch(undisturbed, DESCRIPTION)
    assert await fetch(url, INVALID) == [(0,)]
    assert await fetch(url, "SELECT load_id FROM bulk_loads") == [("nightly",)]


@pytest.mark.timeout(300)
async def test_migration_is_completed_on_the_new_primary() -> None:
    """The old one is killed between statements, or while an index waits to be built."""
    points = Random(SEED).sample(range(1, STATEMENTS + 1), POINTS)
    async with Cluster() as cluster:
        await upgrade(await old_database(cluster, "undisturbed"))
        for point in points:
            url = await old_database(cluster, f"halted{point}")
            migration = await start(url, halt_before=point)
            assert migration.stdout
            assert await migration.stdout.readline() == b"halted\n"
            old = cluster.primary
            await fail_over(cluster)
            await migration.communicate(b"\n")
            assert migration.returncode != 0, f"the migration went on after statement {point}"

            await check(url, cluster.url(database="undisturbed"))
            await cluster.rejoin(old)

        url = await old_database(cluster, "building")
        await upgrade(url, "0010")  # the next migration builds the index first
        async with engine_of(cluster, "building").connect() as writer:
            await writer.execute(text("UPDATE bulk_loads SET options = ''"))
            migration = await start(url, halt_before=0)
            while await cluster.primary.fetch(BUILDING) == 0:
                pass
            while await fetch(url, INVALID) == [(0,)]:
                pass
            await fail_over(cluster)
            await migration.communicate()
            assert migration.returncode != 0
            await writer.invalidate()
        assert await fetch(url, INVALID) == [(1,)]
        await check(url, cluster.url(database="undisturbed"))
