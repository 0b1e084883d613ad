"""The version of the schema, and which releases it admits."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import NullPool, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import revisions
from service.db.migrations import MigrationError
from service.db.schema import Schema, read_schema
from tests.support.migrations import downgrade, execute, migrate_as_old_release, old_version, upgrade

USER = "INSERT INTO users (email) VALUES ('ada@example.org')"
LOAD = "INSERT INTO bulk_loads (load_id, caller, method, options) VALUES ('nightly', '{}', 'm', '')"


@pytest.fixture
def url(empty_url: str) -> str:
    """An empty database, on SQLite and on PostgreSQL."""
    return empty_url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, poolclass=NullPool)
    yield engine
    await engine.dispose()


async def tables(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


async def test_old_database_is_moved_and_stays_usable_for_the_old_release(
    url: str, engine: AsyncEngine
) -> None:
    """Until a contracting migration, whose revision the old release refuses as newer."""
    await migrate_as_old_release(engine)
    await execute(engine, USER, LOAD.format("ada"))
    assert await read_schema(engine) == Schema("0002")

    await upgrade(url, "0010")
    assert (await read_schema(engine), await old_version(engine)) == (Schema("0010", "0001"), ["0002"])
    await upgrade(url)
    assert await old_version(engine) == [revisions.head()]
    await downgrade(url, "0010")
    assert await old_version(engine) == ["0002"]

    async with engine.connect() as connection:
        for table in ("users", "bulk_loads"):
            assert await connection.scalar(text(f"SELECT count(*) FROM {table}")) == 1


@pytest.mark.parametrize("revision", ["0001", "0002"])
async def test_downgrade_gives_the_version_back_to_the_old_release(
    revision: str, url: str, engine: AsyncEngine
) -> None:
    """The old release can then migrate it, and after that this one again."""
    await migrate_as_old_release(engine)
    await upgrade(url)
    await downgrade(url, revision)
    assert await old_version(engine) == [revision]

    await migrate_as_old_release(engine, "0002")
    assert await read_schema(engine) == Schema("0002")
    await upgrade(url)
    assert await read_schema(engine) == Schema(revisions.head(), "0003")
    await downgrade(url, "base")
    assert await old_version(engine) == []


async def test_new_database_can_be_downgraded_for_the_old_release(url: str, engine: AsyncEngine) -> None:
    """Which never had it: only then does it get an `alembic_version`."""
    await upgrade(url)
    assert await old_version(engine) is None
    await downgrade(url, "0002")
    assert await old_version(engine) == ["0002"]


@pytest.mark.parametrize("version", ["0001", "0002", "0003", "ae1027a6acf"])
async def test_foreign_alembic_version_is_left_alone(version: str, url: str, engine: AsyncEngine) -> None:
    """On the way up and down, whatever number it has."""
    await execute(
        engine,
        "CREATE TABLE alembic_version (version_num VARCHAR(32))",
        f"INSERT INTO alembic_version VALUES ('{version}')",
    )
    assert await read_schema(engine) == Schema(None)

    await upgrade(url)
    assert await read_schema(engine) == Schema(revisions.head(), "0003")
    for revision in ("0010", "0008", "0006", "0003", "0002", "0001", "base"):
        await downgrade(url, revision)
        assert await old_version(engine) == [version]
        assert (await read_schema(engine)).revision == (None if revision == "base" else revision)
    await upgrade(url)
    assert (await read_schema(engine)).revision == revisions.head()
    assert await old_version(engine) == [version]


async def test_foreign_version_table_of_another_shape_is_left_alone(url: str, engine: AsyncEngine) -> None:
    """Such as that of several heads, or with other columns, next to tables like Roster's."""
    await migrate_as_old_release(engine)
    await execute(engine, "DROP TABLE alembic_version", "CREATE TABLE alembic_version (branch VARCHAR(32))")
    assert await read_schema(engine) == Schema(None)
    with pytest.raises(MigrationError, match="tables of another application"):
        await upgrade(url)


@pytest.mark.parametrize("version", ["0002", "0004", "7f3a"])
@pytest.mark.parametrize("name", ["users", "posts", "roster_servers", "schema_compatibility"])
async def test_foreign_table_with_a_name_of_roster_stops_the_migration(
    version: str, name: str, url: str, engine: AsyncEngine
) -> None:
    """Nothing is changed, and the error names the table."""
    await execute(
        engine,
        "CREATE TABLE alembic_version (version_num VARCHAR(32))",
        f"INSERT INTO alembic_version VALUES ('{version}')",
        f"CREATE TABLE {name} (id INTEGER, email VARCHAR(100))",
    )
    before = await tables(engine)

    with pytest.raises(MigrationError, match=f"names that Roster needs: {name}; give Roster a database"):
        await upgrade(url)

    assert await tables(engine) == before
    assert await old_version(engine) == [version]


async def test_foreign_table_stops_the_upgrade_of_an_old_database(url: str, engine: AsyncEngine) -> None:
    """Before its version is moved."""
    await migrate_as_old_release(engine)
    await execute(engine, "CREATE TABLE roster_servers (number INTEGER)")
    before = await tables(engine)

    with pytest.raises(MigrationError, match="names that Roster needs: roster_servers;"):
        await upgrade(url)

    assert await tables(engine) == before


async def test_loads_of_one_name_stop_the_downgrade(url: str, engine: AsyncEngine) -> None:
    """Older releases can't hold them; the key stays. On PostgreSQL each step back is one transaction."""
    await upgrade(url)
    await execute(engine, LOAD.format("ada"), LOAD.format("alan"))

    with pytest.raises(MigrationError, match="several callers have a load named 'nightly'"):
        await downgrade(url, "0010")
    assert (await read_schema(engine)).revision == (
        "0004" if engine.dialect.name == "postgresql" else revisions.head()
    )

    await execute(engine, "DELETE FROM bulk_loads WHERE caller = 'alan'")
    await downgrade(url, "0010")
    assert (await read_schema(engine)).revision == "0010"


@pytest.mark.parametrize(
    ("schema", "is_usable", "sentence"),
    [
        (Schema("0011", "0003"), True, "the schema is at revision 0011, the one of this release"),
        (Schema("0010", "0001"), True, "complete the upgrade to 0011 with `roster migrate --contract`"),
        (
            Schema("0002"),
            False,
            "at revision 0002, but this release needs revision 0010; run `roster migrate`",
        ),
        (Schema(None), False, "the database has no schema; run `roster migrate` with the same"),
        (Schema("9999", "0004"), True, "newer than this release, but compatible"),
        (Schema("9999", "0001"), True, "newer than this release, but compatible"),
        (Schema("9999", "9998"), False, "not compatible with it; run the newer release"),
        (Schema("9999"), False, "not compatible with it; run the newer release"),
    ],
)
def test_says_whether_this_release_can_run(schema: Schema, is_usable: bool, sentence: str) -> None:
    assert schema.is_usable == is_usable
    assert sentence in str(schema)
