"""Databases of PostgreSQL that several tests use, one after the other."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import make_url

from tests.support.postgres import Postgres

MAX_BYTES = 4 << 20  # of the tables; it takes longer to clear more

# What a test may have changed besides rows: definitions, rights, settings, and what ANALYZE has found.
SCHEMA = """
    WITH tables AS (SELECT * FROM pg_class WHERE relnamespace = 'public'::regnamespace)
    SELECT md5(concat(
        (SELECT string_agg(concat_ws(' ', relname, reloptions, relacl), ',' ORDER BY oid) FROM tables),
        (SELECT string_agg(concat_ws(' ', attname, atttypid, attnotnull), ',' ORDER BY attrelid, attnum)
            FROM pg_attribute JOIN tables ON tables.oid = attrelid),
        (SELECT string_agg(pg_get_constraintdef(oid), ',' ORDER BY oid)
            FROM pg_constraint WHERE connamespace = 'public'::regnamespace),
        (SELECT string_agg(concat_ws(' ', tgname, tgenabled), ',' ORDER BY oid) FROM pg_trigger),
        (SELECT string_agg(prosrc, ',' ORDER BY oid)
            FROM pg_proc WHERE pronamespace = 'public'::regnamespace),
        (SELECT string_agg(version_num, ',') FROM roster_schema),
        (SELECT string_agg(min_revision, ',') FROM schema_compatibility),
        (SELECT string_agg(nspname, ',') FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%'),
        (SELECT count(*) FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase
            WHERE datname = current_database()),
        (SELECT count(*) FROM pg_statistic JOIN tables ON tables.oid = starelid)
    ))
"""
TERMINATE = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
TABLES = "SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
SIZE = f"SELECT coalesce(sum(pg_table_size(oid)), 0) FROM ({TABLES}) AS tables"
CLEAR = """
    DO $$ DECLARE name regclass; BEGIN
        SET LOCAL lock_timeout = '5s';
        PERFORM set_config('citus.multi_shard_modify_mode', 'sequential', true);
        FOR name IN
            SELECT oid::regclass FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
                AND relname NOT IN ('roster_schema', 'schema_compatibility', 'feed', 'changes')
        LOOP
            EXECUTE format('DELETE FROM %s', name);
        END LOOP;
        DELETE FROM changes;
        UPDATE feed SET feed_id = replace(gen_random_uuid()::text, '-', ''), system_identifier = NULL,
            timeline = NULL, table_oid = NULL, pruned_xid = '0';
        FOR name IN
            SELECT oid::regclass FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'S'
        LOOP
            PERFORM setval(name, 1, false);
        END LOOP;
    END $$
"""


class DatabasePool:
    """Copies of a template, which are cleared after a test; one that a test has altered is dropped.

    To create a database takes 0.2 s of CPU, to clear one a tenth of that.
    """

    def __init__(self, postgres: Postgres, template: str) -> None:
        self._postgres = postgres
        self._template = template
        self._idle: list[str] = []
        self._schema = ""

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """Yield the URL of a database without rows."""
        url = self._idle.pop() if self._idle else await self._create()
        try:
            yield url
        finally:
            if await self._clear(url):
                self._idle.append(url)
            else:
                await self._postgres.drop(url)

    async def close(self) -> None:
        """Drop the databases."""
        while self._idle:
            await self._postgres.drop(self._idle.pop())

    async def _create(self) -> str:
        url = await self._postgres.create(self._template)
        if not self._schema:
            self._schema = await _run(url, SCHEMA)
        return url

    async def _clear(self, url: str) -> bool:
        """Delete all rows; return whether the database is as it was when it was created."""
        try:
            connection = await _connect(url)
        except (OSError, asyncpg.PostgresError):  # a test may have dropped it
            return False
        try:
            await connection.execute(TERMINATE)
            if (
                await connection.fetchval(SIZE) > MAX_BYTES
                or await connection.fetchval(SCHEMA) != self._schema
            ):
                return False
            await connection.execute(CLEAR)
        except asyncpg.PostgresError:
            return False
        finally:
            await connection.close()
        return True


async def _connect(url: str) -> Any:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return await asyncpg.connect(plain)


async def _run(url: str, query: str) -> str:
    connection = await _connect(url)
    try:
        return str(await connection.fetchval(query))
    finally:
        await connection.close()
