"""Migrated databases for the tests; a test that uses `database_url` runs on both kinds."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import make_url

from service.db import distribution, migrations
from service.db.engine import Database
from service.memory import collect_rarely
from service.settings import Settings
from tests.support import citus_skips, pooler_skips
from tests.support.citus import CitusCluster
from tests.support.database_pool import DatabasePool
from tests.support.pgbouncer import PgBouncer, pgbouncer
from tests.support.postgres import Postgres, PostgresServer
from tests.support.standby import (
    ReplicatedDatabase,
    Standby,
    replicated_database,
    replication_is_missing,
)
from tests.support.watchdog import HELD, watching

# How long an example takes depends on what else runs on the machine.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
# Read when grpc is imported, after this file. Its fork handlers can crash the child that starts PostgreSQL.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# These kill, stop and flood processes, and wait for what follows: they depend on when the machine runs which
# process. One that fails is run once more, and reported (R); a fault of the code fails again.
TIMED = (
    "tests/faults/",
    "tests/e2e/hostile/",
    "tests/e2e/test_changes.py",
    "tests/e2e/test_drain.py",
    "tests/e2e/test_read_your_writes.py",
    "tests/e2e/test_replicas.py",
    "tests/e2e/test_two_releases.py",
    "tests/e2e/test_undo.py",
)
FORMS = (
    "test_bulk_repository",
    "test_post_repository",
    "test_repository",
    "test_stable_pages",
    "test_user_repository",
)
# Many servers run at a time, and few tests read their metrics.
os.environ["ROSTER_METRICS_LISTEN"] = ""
# `make test-pooler` runs the tests that use PostgreSQL through a PgBouncer in this mode.
POOLER = os.environ.get("ROSTER_TEST_POOLER", "none")
if POOLER != "none":
    os.environ["ROSTER_DATABASE_POOLER"] = POOLER
# `make test-citus` runs them on the cluster that has this database.
CITUS = os.environ.get("ROSTER_TEST_CITUS_URL", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run tests again that are timed or held the loop; select those for a pooler or for Citus."""
    for item in items:
        only = None if item.nodeid.startswith(TIMED) else [HELD]
        item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=only))
    if POOLER != "none":
        _select(config, items, pooler_skips.SKIPS)
    if CITUS:
        _select(config, items, citus_skips.SKIPS)


def _select(config: pytest.Config, items: list[pytest.Item], skips: dict[str, str]) -> None:
    """Select the tests that use a migrated PostgreSQL, and skip those that are listed with a reason."""
    selected = [item for item in items if _uses_postgresql(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
    for item in items:
        if reason := skips.get(item.nodeid.partition("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))


def _uses_postgresql(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    kinds = [parameters.get(name) for name in ("database_url", "wire")]
    return "postgresql" in kinds or not {"postgresql_url", "citus_cluster"}.isdisjoint(fixtures)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Collect garbage as a server does: the tests themselves are 400,000 objects that stay."""
    collect_rarely()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on both databases; those of repositories also with the SQL that Citus needs."""
    chosen = any("database_url" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    has_own_fixture = hasattr(metafunc.module, "database_url")
    if "database_url" in metafunc.fixturenames and not (chosen or has_own_fixture):
        is_third = metafunc.module.__name__.rpartition(".")[2] in FORMS
        kinds = ["sqlite", "postgresql", *(["distributed"] if is_third else [])]
        metafunc.parametrize("database_url", kinds, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail a test in which a callback of the service holds the event loop for more than 20 ms."""
    with watching() as recorder:
        result = yield
    if recorder.holds:
        pytest.fail("\n".join(recorder.holds), pytrace=False)
    return result


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server that ROSTER_TEST_DATABASE_URL names, the cluster, or a server started for the session."""
    if CITUS:
        yield CitusCluster(make_url(CITUS))
        return
    url = os.environ.get("ROSTER_TEST_DATABASE_URL")
    if url:
        yield Postgres(make_url(url))
        return
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def citus_cluster(postgres: Postgres) -> CitusCluster:
    """The cluster of `make test-citus`."""
    if not isinstance(postgres, CitusCluster):
        pytest.skip("needs a Citus cluster: set ROSTER_TEST_CITUS_URL, and run `make test-citus`")
    return postgres


@pytest.fixture(scope="session")
async def postgresql_template(postgres: Postgres) -> AsyncIterator[str]:
    """The name of a migrated database, which CREATE DATABASE copies faster than migrations run."""
    if isinstance(postgres, CitusCluster):
        async with postgres.template() as name:
            yield name
        return
    async with postgres.database() as url:
        await asyncio.to_thread(migrations.upgrade, url)
        yield str(make_url(url).database)


@pytest.fixture(scope="session")
async def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file."""
    path = tmp_path_factory.mktemp("template") / "roster.db"
    await asyncio.to_thread(migrations.upgrade, f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def pooler(postgres: Postgres) -> Iterator[PgBouncer | None]:
    """The PgBouncer of `make test-pooler`."""
    if POOLER == "none":
        yield None
        return
    with pgbouncer(postgres.url.render_as_string(hide_password=False), "transaction") as pooler:
        yield pooler


@pytest.fixture(scope="session")
async def database_pool(postgres: Postgres, postgresql_template: str) -> AsyncIterator[DatabasePool]:
    """The databases of `postgresql_url`."""
    pool = DatabasePool(postgres, postgresql_template)
    yield pool
    await pool.close()


@pytest.fixture
async def postgresql_url(database_pool: DatabasePool, pooler: PgBouncer | None) -> AsyncIterator[str]:
    """A database of the test on PostgreSQL."""
    async with database_pool.database() as url:
        yield pooler.url(url) if pooler else url


@pytest.fixture
def distributed_url(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of the test on PostgreSQL, which is taken for one of Citus."""

    async def shard_counts(_: object) -> dict[str, int]:
        return {"posts": 8}

    monkeypatch.setattr(distribution, "_shard_counts", shard_counts)
    return postgresql_url


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A database of the test on SQLite."""
    return f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path)}"


@pytest.fixture
async def empty_postgresql_url(postgres: Postgres) -> AsyncIterator[str]:
    """An empty database of the test's own on PostgreSQL; on a cluster, it is the coordinator's alone."""
    server = postgres.coordinator if isinstance(postgres, CitusCluster) else postgres
    async with server.database() as url:
        yield url


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """A file of the test's own that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path}/empty.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """An empty database of the test's own, on SQLite and on PostgreSQL."""
    return str(request.getfixturevalue(f"empty_{request.param}_url"))


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """A database of the test, on SQLite and on PostgreSQL."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The `Database` on a database of the test."""
    database = Database(Settings(database_url=database_url))
    yield database
    await database.close()


@pytest.fixture(scope="session")
def standby() -> Iterator[Standby]:
    """A standby, and its primary, of the session."""
    if missing := replication_is_missing():
        pytest.skip(missing)
    with PostgresServer() as primary, Standby(primary) as standby:
        yield standby


@pytest.fixture(scope="session")
async def replicated_template(standby: Standby) -> AsyncIterator[str]:
    """The name of a migrated database of the primary."""
    async with standby.primary.database() as url:
        await asyncio.to_thread(migrations.upgrade, url)
        yield str(make_url(url).database)


@pytest.fixture
async def replicated(standby: Standby, replicated_template: str) -> AsyncIterator[ReplicatedDatabase]:
    """A database of the test, replicated to the standby."""
    async with replicated_database(standby, replicated_template) as database:
        yield database
