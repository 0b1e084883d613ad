"""The databases that tests share: none of them sees what another one did."""

import pytest
from sqlalchemy import text

from service.db.engine import Database
from service.settings import Settings
from tests.support.database_pool import DatabasePool
from tests.support.postgres import Postgres
from tests.support.rows import add_users


@pytest.fixture
async def pool(postgres: Postgres, postgresql_template: str) -> DatabasePool:
    """A pool of the test's own."""
    return DatabasePool(postgres, postgresql_template)


async def change(url: str, *statements: str) -> list[int]:
    """Add a user, execute statements, and return the id of the user; the connection stays open."""
    database = Database(Settings(database_url=url))
    ids = await add_users(database)
    async with database.begin() as session:
        for statement in statements:
            await session.execute(text(statement))
    return ids


async def test_rows_are_deleted(pool: DatabasePool) -> None:
    """Ids begin at 1 again. Connections that a test has left open are closed."""
    async with pool.database() as first:
        assert await change(first) == [1]
    async with pool.database() as second:
        assert await change(second) == [1]
    assert first == second
    await pool.close()


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE posts DISABLE TRIGGER USER",
        "ALTER TABLE posts ADD COLUMN extra text",
        "CREATE SCHEMA other",
        "ANALYZE users",
        "GRANT SELECT ON users TO public",
        "UPDATE schema_compatibility SET min_revision = '0001'",
    ],
)
async def test_altered_database_is_dropped(pool: DatabasePool, statement: str) -> None:
    """Only rows can be put back."""
    async with pool.database() as altered:
        await change(altered, statement)
    async with pool.database() as other:
        assert other != altered
    await pool.close()
