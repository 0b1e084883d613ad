"""The feed begins again if the database is not the one that wrote its log, and otherwise never."""

import asyncio
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from roster.errors import Unsupported
from service.changes.reset import reset_feed
from service.changes.token import Token
from service.db import migrations
from tests.support.feed import Consumer, assert_begins_again
from tests.support.postgres import Postgres, find_programs


@pytest.fixture
async def consumer(database_url: str) -> AsyncIterator[Consumer]:
    """A server on a database of the test."""
    consumer = Consumer(database_url)
    yield consumer
    await consumer.close()


@pytest.fixture
async def on_postgresql(postgresql_url: str) -> AsyncIterator[Consumer]:
    """A server on a database of PostgreSQL."""
    consumer = Consumer(postgresql_url)
    yield consumer
    await consumer.close()


async def run(program: str, url: str, *arguments: str | Path) -> None:
    """Run one of PostgreSQL's programs on a database; it must succeed, without a warning."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    command = [find_programs(program) / program, f"--dbname={plain}", *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")


async def dump(url: str, file: Path, *arguments: str) -> None:
    await run("pg_dump", url, f"--file={file}", *arguments)


async def test_dump_in_another_database_begins_again(
    on_postgresql: Consumer, postgresql_url: str, postgres: Postgres, tmp_path: Path
) -> None:
    """Of the same cluster, with tokens from before and after the dump."""
    tokens = [await on_postgresql.token()]
    await on_postgresql.add_user("ada")
    await dump(postgresql_url, tmp_path / "dump", "--format=custom")
    await on_postgresql.add_user("alan")
    tokens.append(await on_postgresql.token())
    async with postgres.database() as restored:
        await run("pg_restore", restored, "--exit-on-error", tmp_path / "dump")
        await assert_begins_again(restored, tokens)


async def test_dump_in_the_same_database_begins_again(
    on_postgresql: Consumer, postgresql_url: str, tmp_path: Path
) -> None:
    """With `--clean`; also a dump of Roster's schema only, as SQL."""
    tokens = [await on_postgresql.token()]
    await on_postgresql.add_user("ada")
    await dump(postgresql_url, tmp_path / "dump", "--clean", "--if-exists", "--schema=public")
    await on_postgresql.add_user("alan")
    tokens.append(await on_postgresql.token())
    await on_postgresql.close()
    await run(
        "psql",
        postgresql_url,
        "--quiet",
        "--set=ON_ERROR_STOP=1",
        "--output=/dev/null",
        "--file",
        tmp_path / "dump",
    )
    await assert_begins_again(postgresql_url, tokens)


@pytest.mark.parametrize("emptied", ["users, posts, changes, feed", "changes, feed", "feed"])
async def test_data_restored_into_existing_tables_begins_again(
    emptied: str, on_postgresql: Consumer, postgresql_url: str, tmp_path: Path
) -> None:
    """The tables are those that wrote the log, but its rows are old, and so is the id of the feed."""
    await on_postgresql.add_user("ada")
    before = await on_postgresql.token()
    tables = [f"--table={name}" for name in emptied.split(", ")]
    await dump(postgresql_url, tmp_path / "dump", "--format=custom", "--data-only", *tables)
    await on_postgresql.add_user("alan")
    after = await on_postgresql.token()
    await on_postgresql.execute(f"TRUNCATE {emptied} CASCADE")
    await run("pg_restore", postgresql_url, "--exit-on-error", tmp_path / "dump")
    await assert_begins_again(postgresql_url, [before, after])


async def test_data_restored_next_to_the_feed_begins_again(
    on_postgresql: Consumer, postgresql_url: str
) -> None:
    """A second row of another feed replaces the first one."""
    token = await on_postgresql.token()
    await on_postgresql.execute(f"INSERT INTO feed (feed_id, system_identifier) VALUES ('{'a' * 32}', 1)")
    assert await on_postgresql.is_reset(token)
    await assert_begins_again(postgresql_url, [token])


async def test_copy_of_a_database_begins_again(
    on_postgresql: Consumer, postgresql_url: str, postgres: Postgres
) -> None:
    """One made with CREATE DATABASE has the same oids, and the same sequence of xids as its original."""
    await on_postgresql.add_user("ada")
    token = await on_postgresql.token()
    await on_postgresql.close()
    async with postgres.database(str(make_url(postgresql_url).database)) as copy:
        await assert_begins_again(copy, [token])
    again = Consumer(postgresql_url)
    assert await again.changed_ids(token) == []
    await again.close()


@pytest.mark.parametrize("table", ["users", "posts", "changes"])
async def test_truncate_begins_again(table: str, on_postgresql: Consumer, postgresql_url: str) -> None:
    """Nobody can say which rows are gone, or which entries."""
    token = await on_postgresql.token()
    await on_postgresql.add_user("ada")
    await on_postgresql.execute(f"TRUNCATE {table} CASCADE")
    assert await on_postgresql.is_reset(token)
    fresh = await on_postgresql.token()
    id = await on_postgresql.add_user("alan")
    assert await on_postgresql.changed_ids(fresh) == [id]


async def test_truncate_that_is_rolled_back_changes_nothing(on_postgresql: Consumer) -> None:
    token = await on_postgresql.token()
    id = await on_postgresql.add_user("ada")
    async with on_postgresql.database.engine.connect() as connection:
        await connection.execute(text("TRUNCATE users CASCADE"))
        await connection.rollback()
    assert await on_postgresql.changed_ids(token) == [id]


async def test_feed_without_its_row_begins_again(consumer: Consumer, database_url: str) -> None:
    """Several servers find that at the same time; there is one feed afterwards."""
    token = await consumer.token()
    await consumer.add_user("ada")
    await consumer.execute("DELETE FROM feed")
    servers = [Consumer(database_url) for _ in range(4)]
    fresh = await asyncio.gather(*(server.token() for server in servers))
    assert len({each.feed_id for each in fresh}) == 1
    async with consumer.database.read() as session:
        assert await session.scalar(text("SELECT count(*) FROM feed")) == 1
    for server in servers:
        await server.close()
    await assert_begins_again(database_url, [token])


async def test_tables_that_are_written_anew_keep_the_feed(
    on_postgresql: Consumer, postgresql_url: str
) -> None:
    """As by VACUUM FULL and pg_repack, which give a table another file, but not another oid."""
    tokens = [await on_postgresql.token()]
    ids = [await on_postgresql.add_user("ada")]
    tokens.append(await on_postgresql.token())
    ids.append(await on_postgresql.add_user("alan"))
    connection = on_postgresql.database.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with connection.connect() as session:
        for statement in (
            "VACUUM FULL feed",
            "VACUUM FULL changes",
            "VACUUM FULL users",
            "CLUSTER changes USING pk_changes",
            "CLUSTER feed USING pk_feed",
            "REINDEX TABLE changes",
            "REINDEX TABLE CONCURRENTLY feed",
            "ALTER TABLE feed SET UNLOGGED",
            "ALTER TABLE feed SET LOGGED",
        ):
            await session.execute(text(statement))
    other = Consumer(postgresql_url)
    assert [await other.changed_ids(token) for token in tokens] == [ids, ids[1:]]
    await other.close()


async def test_schema_that_is_renamed_keeps_the_feed(on_postgresql: Consumer, postgresql_url: str) -> None:
    """Its triggers write the log in the new schema, whatever the session searches."""
    token = await on_postgresql.token()
    name = make_url(postgresql_url).database
    await on_postgresql.execute(
        "ALTER SCHEMA public RENAME TO roster", f"ALTER DATABASE {name} SET search_path = roster"
    )
    await on_postgresql.close()
    renamed = Consumer(postgresql_url)
    id = await renamed.add_user("ada")
    assert await renamed.changed_ids(token) == [id]
    await renamed.execute("TRUNCATE users CASCADE")
    assert await renamed.is_reset(token)
    await renamed.close()


async def test_dump_in_another_schema_is_logged_there(
    on_postgresql: Consumer, postgresql_url: str, postgres: Postgres, tmp_path: Path
) -> None:
    """One that was renamed in the text of the dump, as there is no option for it."""
    await on_postgresql.add_user("ada")
    token = await on_postgresql.token()
    await dump(postgresql_url, tmp_path / "dump", "--schema=public")
    sql = (tmp_path / "dump").read_text().replace("public", "elsewhere")
    (tmp_path / "dump").write_text(sql)
    async with postgres.database() as restored:
        await run(
            "psql",
            restored,
            "--quiet",
            "--set=ON_ERROR_STOP=1",
            "--output=/dev/null",
            "--file",
            tmp_path / "dump",
        )
        await run(
            "psql",
            restored,
            "--quiet",
            "--command",
            f"ALTER DATABASE {make_url(restored).database} SET search_path = elsewhere",
        )
        await assert_begins_again(restored, [token])


async def test_writes_without_triggers_end_the_feed(consumer: Consumer, database_url: str) -> None:
    """It is not available, and once it is again, older tokens are not valid: some changes are missing."""
    token = await consumer.token()
    if consumer.database.is_sqlite:
        async with consumer.database.read() as session:
            name = "log_insert_of_users"
            query = text("SELECT sql FROM sqlite_schema WHERE name = :name")
            disable, enable = f"DROP TRIGGER {name}", str(await session.scalar(query, {"name": name}))
    else:
        disable, enable = (f"ALTER TABLE users {verb} TRIGGER USER" for verb in ("DISABLE", "ENABLE"))
    await consumer.execute(disable)
    await consumer.add_user("ada")
    with pytest.raises(Unsupported, match="triggers that log changes are missing or disabled"):
        await consumer.feed.read(token)
    await consumer.execute(enable)
    await assert_begins_again(database_url, [token])


async def test_older_copy_on_sqlite_refuses_tokens_of_its_future(sqlite_url: str, tmp_path: Path) -> None:
    """A file that was put back; of the rest, `roster changes reset` takes care."""
    consumer = Consumer(sqlite_url)
    await consumer.add_user("ada")
    before = await consumer.token()
    await consumer.close()
    file = str(make_url(sqlite_url).database)
    shutil.copy(file, tmp_path / "backup.db")

    consumer = Consumer(sqlite_url)
    await consumer.add_user("alan")
    after = await consumer.token()
    await consumer.close()
    shutil.copy(tmp_path / "backup.db", file)  # the last connection has removed the write-ahead log

    consumer = Consumer(sqlite_url)
    assert await consumer.is_reset(after)
    assert await consumer.changed_ids(before) == []
    await reset_feed(consumer.database, is_forced=True)
    assert await consumer.is_reset(before)
    await consumer.close()
    await assert_begins_again(sqlite_url, [before, after])


async def test_reset_feed_is_that_of_all_servers(consumer: Consumer, database_url: str) -> None:
    """The log of the one before is emptied."""
    tokens: list[Token] = [await consumer.token()]
    await consumer.add_user("ada")
    await reset_feed(consumer.database)
    assert not await consumer.is_reset(tokens[0])
    await reset_feed(consumer.database, is_forced=True)
    await assert_begins_again(database_url, tokens)


async def test_migrate_creates_missing_triggers_and_begins_another_feed(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a restore without them; writes in between are not in the log. Disabled triggers stay so."""
    consumer = Consumer(postgresql_url)
    tokens = [await consumer.token()]
    await consumer.execute("DROP TRIGGER log_insert ON users")
    await consumer.add_user("ada")
    with caplog.at_level(logging.INFO, logger="service.changes"):
        await asyncio.to_thread(migrations.upgrade, postgresql_url)
    assert "created the triggers of the change feed" in caplog.text
    await assert_begins_again(postgresql_url, tokens)

    caplog.clear()
    tokens = [await consumer.token()]
    await consumer.add_user("alan")
    for _ in range(2):
        with caplog.at_level(logging.INFO, logger="service.changes"):
            await asyncio.to_thread(migrations.upgrade, postgresql_url)
    assert "created" not in caplog.text
    assert len((await consumer.feed.read(tokens[0])).changes) == 1

    await consumer.execute("ALTER TABLE users DISABLE TRIGGER log_insert")
    await asyncio.to_thread(migrations.upgrade, postgresql_url)
    with pytest.raises(Unsupported, match="missing or disabled; enable them, or run `roster migrate`"):
        await consumer.feed.read(tokens[0])
    await consumer.execute("ALTER TABLE users ENABLE TRIGGER log_insert")
    await consumer.close()
