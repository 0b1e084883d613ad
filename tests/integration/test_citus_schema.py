"""A database becomes a distributed one, is migrated, and becomes an ordinary one again.

It needs the cluster of ROSTER_TEST_CITUS_URL.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from roster.v1.changes_pb2 import ListChangesRequest
from roster.v1.changes_pb2_grpc import ChangeServiceStub
from roster.v1.posts_pb2 import CreatePostRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import ddl, revisions
from service.db.capabilities.citus import LAYOUT, TABLES
from tests.e2e.test_feed_support import assert_works_without_feed
from tests.support.citus import DISTRIBUTE, CitusCluster, distribute
from tests.support.command import ROSTER, run
from tests.support.migrations import downgrade, upgrade
from tests.support.postgres import Postgres
from tests.support.server import serve

URL = os.environ.get("ROSTER_TEST_CITUS_URL", "")
pytestmark = [
    pytest.mark.skipif(not URL, reason="ROSTER_TEST_CITUS_URL does not name a Citus cluster"),
    pytest.mark.timeout(180),
]
FILL = """
    INSERT INTO users (email) SELECT n || '@example.org' FROM generate_series(1, 20) AS n;
    INSERT INTO posts (title, content, author_id) SELECT n, '', 1 + n % 20 FROM generate_series(1, 200) AS n;
    INSERT INTO bulk_loads (load_id, caller, method, options)
        SELECT 'load ' || n, 'ada', 'm', '' FROM generate_series(1, 3) AS n;
    INSERT INTO bulk_batches (load, first_offset, next_offset, results, ids) VALUES (3, 0, 1, '', '');
    DELETE FROM bulk_loads WHERE load_id = 'load 2';
"""
COUNTS = """
    SELECT array[(SELECT count(*) FROM users), (SELECT count(*) FROM posts),
                 (SELECT count(*) FROM bulk_loads), (SELECT count(*) FROM bulk_batches)]
"""
FILLED = [20, 200, 2, 1]
NEXT_IDS = """
    SELECT array_agg(nextval(pg_get_serial_sequence(name, 'id')) ORDER BY name)
    FROM unnest(array['bulk_loads', 'posts', 'users']) AS name
"""
TRIGGERS = """
    SELECT count(*) FROM pg_trigger
    WHERE tgrelid IN ('users'::regclass, 'posts'::regclass) AND NOT tgisinternal
"""
CASCADE = """
    SELECT confdeltype = 'c' FROM pg_constraint
    WHERE conrelid = 'posts'::regclass AND confrelid = 'users'::regclass
      AND conname = 'fk_posts_author_id_users' AND convalidated
"""
LEFT_BEHIND = "SELECT pg_relation_size('users') + pg_relation_size('posts')"
ADD_KEY = """
    ALTER TABLE bulk_batches ADD CONSTRAINT fk_bulk_batches_load_bulk_loads
        FOREIGN KEY (load) REFERENCES bulk_loads (id) ON DELETE CASCADE
"""
FEED_ID = "SELECT feed_id FROM feed"
REQUEST = (
    "INSERT INTO requests (caller, method, request_id, fingerprint) VALUES ('a', 'm', gen_random_uuid(), '')"
)
BATCH = "INSERT INTO bulk_batches (load, first_offset, next_offset, results, ids) VALUES (1, 0, 1, '', '')"
POST = "INSERT INTO posts (title, content, author_id) VALUES ('one', '', 1)"


@pytest.fixture
def citus_cluster() -> CitusCluster:
    """The cluster of ROSTER_TEST_CITUS_URL."""
    return CitusCluster(make_url(URL))


@asynccontextmanager
async def ordinary(cluster: CitusCluster) -> AsyncIterator[str]:
    """Create an empty database without the extension on all nodes."""
    name = await cluster.reserve_name()
    url = cluster.url.set(database=name).render_as_string(hide_password=False)
    for node in await cluster.nodes():
        await node.execute(f"CREATE DATABASE {name}")
    try:
        yield url
    finally:
        await cluster.drop(url)


@pytest.fixture
async def plain_url(citus_cluster: CitusCluster) -> AsyncIterator[str]:
    """An empty database on all nodes, which does not have the extension."""
    async with ordinary(citus_cluster) as url:
        yield url


async def add_extension(cluster: CitusCluster, url: str) -> None:
    """Create the extension in a database, and connect its nodes."""
    async with cluster._alone():
        await cluster._connect_nodes(make_url(url).database)


@pytest.fixture
async def url(citus_cluster: CitusCluster, plain_url: str) -> str:
    """An empty database with the extension."""
    await add_extension(citus_cluster, plain_url)
    return plain_url


async def fetch(url: str, query: str) -> Any:
    return await Postgres(make_url(url)).fetch(query)


async def execute(url: str, *statements: str) -> None:
    """Run statements in one transaction."""
    await Postgres(make_url(url)).execute(";".join(statements))


async def layout(url: str) -> dict[str, str]:
    """Return what each table is to Citus."""
    connection = await asyncpg.connect(make_url(url).set(drivername="postgresql").render_as_string(False))
    try:
        return dict(map(tuple, await connection.fetch(TABLES)))
    finally:
        await connection.close()


@pytest.mark.parametrize("extension", ["first", "last"])
async def test_distributes_a_filled_database(
    extension: str, citus_cluster: CitusCluster, plain_url: str
) -> None:
    """No row, id, key or trigger is wrong after it; a second run changes nothing."""
    url = plain_url
    if extension == "first":
        await add_extension(citus_cluster, url)
    await upgrade(url)
    await execute(url, FILL)
    if extension == "last":
        assert await fetch(url, TRIGGERS)
        await add_extension(citus_cluster, url)

    for last_ids in ([3, 200, 20], [4, 201, 21]):
        await distribute(url)
        assert await layout(url) == LAYOUT
        assert await fetch(url, COUNTS) == FILLED
        assert await fetch(url, NEXT_IDS) == [id + 1 for id in last_ids]
        assert await fetch(url, CASCADE)
        assert not await fetch(url, TRIGGERS)
        assert await fetch(url, LEFT_BEHIND) == 0


async def test_service_works_on_an_empty_database(url: str) -> None:
    """There is no feed, and no watch_token."""
    await upgrade(url)
    await distribute(url)
    await assert_works_without_feed(url, "on Citus there can be none")


@pytest.mark.parametrize("local", [REQUEST, BATCH], ids=["request", "batch"])
async def test_local_write_and_one_shard_commit_in_two_phases(local: str, url: str) -> None:
    """A crash can't store a post without its request, or without the watermark of its load."""
    await upgrade(url)
    await distribute(url)
    await execute(url, FILL)
    prepared = "SELECT count(*) FROM pg_dist_transaction"
    before = await fetch(url, prepared)

    await execute(url, POST, local)

    assert await fetch(url, prepared) > before


REFUSALS = {
    "the extension citus is missing": "DROP EXTENSION citus CASCADE",
    "under which name the workers reach": "DELETE FROM pg_dist_node WHERE groupid = 0",
    "no worker is registered": "UPDATE pg_dist_node SET shouldhaveshards = false",
    "Roster has no tables here": "DROP TABLE posts",
    "triggers that are not Roster's: own on users": """
        CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER own AFTER INSERT ON users EXECUTE FUNCTION own()
    """,
    "posts is a local or a reference table": "SELECT citus_add_local_table_to_metadata('posts', true)",
    "posts is distributed, but not by id": """
        ALTER TABLE posts DROP CONSTRAINT fk_posts_author_id_users, DROP CONSTRAINT pk_posts;
        SELECT create_distributed_table('posts', 'author_id')
    """,
}


@pytest.mark.parametrize("sentence", REFUSALS)
async def test_refuses_what_it_can_not_distribute(sentence: str, url: str) -> None:
    """Nothing is changed."""
    await upgrade(url)
    await execute(url, REFUSALS[sentence])
    before = {} if "extension" in sentence else await layout(url)

    with pytest.raises(asyncpg.RaiseError, match=sentence):
        await distribute(url)

    assert before == ({} if "extension" in sentence else await layout(url))


async def test_refuses_while_servers_run(citus_cluster: CitusCluster, plain_url: str) -> None:
    """They ask for the tables that are distributed when they connect. Later runs don't mind them."""
    await upgrade(plain_url)
    await add_extension(citus_cluster, plain_url)
    async with serve(plain_url):
        with pytest.raises(asyncpg.RaiseError, match=f"servers are connected: roster {revisions.head()}"):
            await distribute(plain_url)
    assert await fetch(plain_url, TRIGGERS)

    await distribute(plain_url)
    async with serve(plain_url):
        await distribute(plain_url)


async def test_fails_as_a_whole(citus_cluster: CitusCluster, plain_url: str) -> None:
    """Its last step fails, and the triggers are still there."""
    await upgrade(plain_url)
    await execute(plain_url, FILL, "ALTER TABLE requests RENAME TO others")
    await add_extension(citus_cluster, plain_url)

    with pytest.raises(asyncpg.PostgresError):
        await distribute(plain_url)

    assert await layout(plain_url) == {}
    assert await fetch(plain_url, TRIGGERS)
    assert await fetch(plain_url, COUNTS) == FILLED


@pytest.mark.parametrize("extension", ["first", "last"])
async def test_role_of_the_service_may_write_every_shard(
    extension: str, citus_cluster: CitusCluster, plain_url: str
) -> None:
    """Neither role is a superuser: the owner distributes the tables, and Citus has the roles on all nodes."""
    name = f"roster_test_{uuid4().hex}"
    roles = (DISTRIBUTE.parent / "roles.sql").read_text().replace("roster_migrator", f"{name}_m")
    migrator, service = (make_url(plain_url).set(username=f"{name}_{role}") for role in "ms")
    try:
        if extension == "first":
            await add_extension(citus_cluster, plain_url)
        await execute(plain_url, roles.replace("roster_service", f"{name}_s"))
        as_migrator = migrator.render_as_string(hide_password=False)
        await upgrade(as_migrator)
        if extension == "last":
            await add_extension(citus_cluster, plain_url)
        await distribute(as_migrator)

        async with (
            serve(service.render_as_string(hide_password=False)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            users, posts = UserServiceStub(channel), PostServiceStub(channel)
            ada = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
            for number in range(40):
                post = Post(author_id=ada.id, title=str(number))
                await posts.CreatePost(CreatePostRequest(post=post, request_id=str(uuid4())))
    finally:
        await citus_cluster.drop(plain_url)
        for node in await citus_cluster.nodes():
            await node.execute(f"DROP ROLE IF EXISTS {name}_m; DROP ROLE IF EXISTS {name}_s")


@pytest.mark.parametrize("revision", ["0003", "0006", "0008", "0010", "0004"])
async def test_older_database_is_migrated_after_it_was_distributed(
    revision: str, citus_cluster: CitusCluster, plain_url: str
) -> None:
    """Up to the newest revision, and down."""
    await upgrade(plain_url, revision)
    await execute(plain_url, FILL)
    await add_extension(citus_cluster, plain_url)
    await distribute(plain_url)

    await upgrade(plain_url)
    await distribute(plain_url)
    await downgrade(plain_url, "0003")
    await upgrade(plain_url)

    assert await layout(plain_url) == LAYOUT
    assert await fetch(plain_url, COUNTS) == FILLED
    assert not await fetch(plain_url, TRIGGERS)


def expand(connection: Connection) -> None:
    """Add columns and indexes, and fill a column, as a migration does."""
    context = MigrationContext.configure(connection)
    with Operations.context(context), context.begin_transaction():
        assert context.connection
        context.connection.exec_driver_sql(ddl.ONE_BY_ONE)  # as `alembic/env.py` does
        ddl.add_columns(
            (table, sa.Column("nickname", sa.String(40), nullable=True)) for table in ("users", "posts")
        )
        for table in ("users", "posts"):
            ddl.create_index(f"ix_{table}_nickname_id", table, ["nickname", "id"])
        ddl.create_index("uq_users_nickname", "users", ["nickname"], unique=True)
        for table, column in (("users", "email"), ("posts", "title")):
            fill = f"UPDATE {table} SET nickname = {column} WHERE id BETWEEN :first AND :last"
            ddl.backfill(table, f"{fill} AND nickname IS NULL", batch_rows=7)
        ddl.log_changes("users", "posts")


def contract(connection: Connection) -> None:
    """Drop them, as a later migration does."""
    context = MigrationContext.configure(connection)
    with Operations.context(context) as operations, context.begin_transaction():
        ddl.stop_logging_changes("users", "posts")
        for table in ("users", "posts"):
            ddl.drop_index(f"ix_{table}_nickname_id", table)
        operations.alter_column("posts", "nickname", nullable=False)
        operations.drop_column("posts", "nickname")
        operations.drop_column("users", "nickname")


async def test_later_migrations_reach_all_shards(url: str) -> None:
    """Each step can be repeated."""
    await upgrade(url)
    await execute(url, FILL)
    await distribute(url)
    engine = create_async_engine(url, poolclass=NullPool)
    names = """
        SELECT array[(SELECT count(*) FROM users WHERE nickname = email),
                     (SELECT count(*) FROM posts WHERE nickname = title)]
    """
    indexes = """
        SELECT count(*) FROM (
            SELECT unnest(result::text[]) FROM run_command_on_shards(
                'posts', $$SELECT array_agg(indexrelid) FROM pg_index
                WHERE indrelid = '%s'::regclass AND indisvalid AND pg_get_indexdef(indexrelid) ~ 'nickname'$$)
        ) AS found
    """
    shards = "SELECT count(*) FROM pg_dist_shard WHERE logicalrelid = 'posts'::regclass"

    for _ in range(2):
        async with engine.connect() as connection:
            await connection.run_sync(expand)
            await connection.commit()
    assert await fetch(url, names) == FILLED[:2]
    assert await fetch(url, indexes) == await fetch(url, shards)
    with pytest.raises(asyncpg.UniqueViolationError):
        await execute(url, "UPDATE users SET nickname = '1@example.org' WHERE id = 2")

    async with engine.connect() as connection:
        await connection.run_sync(contract)
        await connection.commit()
    await engine.dispose()
    await distribute(url)
    assert await layout(url) == LAYOUT
    assert await fetch(url, COUNTS) == FILLED


@pytest.mark.parametrize("extension", ["first", "last"])
async def test_dump_of_the_coordinator_becomes_an_ordinary_database(
    extension: str, citus_cluster: CitusCluster, plain_url: str, tmp_path: Path
) -> None:
    """`roster migrate` creates the triggers of the feed, whether it was ever there, and a new feed begins."""
    if extension == "first":
        await add_extension(citus_cluster, plain_url)
    await upgrade(plain_url)
    await execute(plain_url, FILL)
    if extension == "last":
        await add_extension(citus_cluster, plain_url)
    await distribute(plain_url)
    feed_id = await fetch(plain_url, FEED_ID)

    async with ordinary(citus_cluster) as restored:
        await asyncio.to_thread(dump_and_restore, plain_url, restored)
        outputs = [await run(ROSTER, "migrate", folder=tmp_path, ROSTER_DATABASE_URL=restored) for _ in "12"]

        up_to_date = f"schema is up to date (revision {revisions.head()})\n"
        assert [(output.status, output.out) for output in outputs] == [(0, up_to_date)] * 2
        created = "created the triggers of the change feed, which were missing; a new feed begins\n"
        assert [output.err for output in outputs] == [created, ""]
        assert await fetch(restored, COUNTS) == FILLED
        assert await fetch(restored, FEED_ID) != feed_id
        assert await fetch(restored, CASCADE)
        assert await fetch(restored, "SELECT count(*) FROM pg_constraint WHERE contype = 'f'") == 2
        assert await fetch(restored, NEXT_IDS) == [4, 201, 21]
        async with serve(restored) as server, grpc.aio.insecure_channel(server.address) as channel:
            changes = ChangeServiceStub(channel)
            begin = await changes.ListChanges(ListChangesRequest())
            await execute(restored, "DELETE FROM users WHERE id = 1")
            page = await changes.ListChanges(ListChangesRequest(token=begin.token))
        assert [change.deleted_user_id for change in page.changes][-1] == 1
        assert len(page.changes) == 1 + 10


def dump_and_restore(source: str, target: str) -> None:
    """Copy a database as docs/scaling.md says."""
    dump = shutil.which("pg_dump")
    assert dump
    places = [make_url(url).set(drivername="postgresql").render_as_string(False) for url in (source, target)]
    made = subprocess.run(
        [dump, "--extension=plpgsql", f"--dbname={places[0]}"], check=True, capture_output=True
    )
    psql = shutil.which("psql")
    assert psql
    command = [psql, "--quiet", "--set=ON_ERROR_STOP=1", f"--dbname={places[1]}"]
    subprocess.run(command, input=made.stdout, check=True, capture_output=True)
    subprocess.run([*command, f"--command={ADD_KEY}"], check=True, capture_output=True)


async def test_doctor_describes_the_cluster(url: str, tmp_path: Path) -> None:
    """It says whether the tables are distributed, and what is lost. It leaves nothing behind."""

    async def lines() -> list[str]:
        command = await run(ROSTER, "doctor", "--database", folder=tmp_path, ROSTER_DATABASE_URL=url)
        assert (command.err, command.status) == ("", 0 if "FAIL" not in command.out else 1)
        return command.out.splitlines()

    assert (
        "warn  engine    Citus has none of Roster's tables; run `roster migrate`, then deploy/sql/citus.sql"
        in (await lines())
    )
    await upgrade(url)
    assert "warn  engine    Roster's tables are not distributed; run deploy/sql/citus.sql" in await lines()

    await distribute(url)
    found = await lines()
    assert found[1].startswith("ok    engine    PostgreSQL 1")
    assert " with Citus 1" in found[1]
    assert found[2].startswith("ok    engine    posts has 32 shards on 2 workers")
    assert found[3] == "ok    engine    two-phase commit on 3 nodes"
    assert found[4].startswith("warn  engine    without on Citus: the change feed")
    assert [line for line in found if line.startswith("warn")] == found[4:5]
    assert not await fetch(url, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'roster%'")

    await execute(
        url, "CREATE TABLE other AS TABLE requests; DROP TABLE requests; ALTER TABLE other RENAME TO requests"
    )
    assert any("requests is unknown to it instead of local" in line for line in await lines())
