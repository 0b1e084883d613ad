"""A Citus cluster for the tests: the one of `make test-citus`."""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
from sqlalchemy import URL, make_url

from service.db import migrations
from tests.support.postgres import Postgres

DISTRIBUTE = Path(__file__).parents[2] / "deploy/sql/citus.sql"
NODES = "SELECT nodename, nodeport FROM pg_dist_node WHERE isactive ORDER BY groupid"
ADD_COORDINATOR = "SELECT citus_set_coordinator_host($1, $2)"
ADD_WORKER = "SELECT citus_add_node($1, $2)"
PREPARED = "SELECT array_agg(gid) FROM pg_prepared_xacts WHERE database = $1"
TERMINATE = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{}'"
SHARDS = int(os.environ.get("SHARDS") or 8)
ONE_AT_A_TIME = 7238002  # the advisory lock
DATABASES = "SELECT array_agg(datname::text) FROM pg_database WHERE datname ~ '^roster_test_[0-9a-f]{8}_'"
# A run has a session whose name is the beginning of those of its databases.
RUNS = "SELECT array_agg(DISTINCT application_name) FROM pg_stat_activity"


class CitusCluster(Postgres):
    """The cluster whose coordinator has the database of a URL; each database of a test is on all nodes.

    The tests must reach the workers under the names that the coordinator has for them, with the same role.
    """

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self._run = f"roster_test_{uuid4().hex[:8]}"
        self._session: Any = None
        self._existing: set[str] = set()
        self._nodes: list[Postgres] = []

    @property
    def coordinator(self) -> Postgres:
        """The server of the coordinator, for databases that the workers don't have."""
        return Postgres(self.url)

    async def create(self, template: str = "template1") -> str:
        """Create a database on all nodes: a copy of one of the cluster's, or an empty one."""
        name = await self.reserve_name()
        await asyncio.gather(*(_copy(node, template, name) for node in await self.nodes()))
        if template == "template1":
            async with self._alone():
                await self._connect_nodes(name)
        return self.url.set(database=name).render_as_string(hide_password=False)

    async def reserve_name(self) -> str:
        """Return a name for a database of this run, which `drop` drops."""
        if self._session is None:
            await self._begin()
        name = f"{self._run}_{uuid4().hex}"
        self._existing.add(name)
        return name

    async def drop(self, url: str) -> None:
        """Drop a database on all nodes."""
        name = str(make_url(url).database)
        await self._drop(name)
        self._existing.discard(name)
        if self._session and not self._existing:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def template(self) -> AsyncIterator[str]:
        """Yield the name of a database that is migrated and distributed, to be copied."""
        url = await self.create()
        # Each shard takes time in each copy and each statement.
        await self.execute(f"ALTER DATABASE {make_url(url).database} SET citus.shard_count = {SHARDS}")
        await asyncio.to_thread(migrations.upgrade, url)
        async with self._alone():
            await distribute(url)
        await self._close(url)
        yield str(make_url(url).database)
        await self.drop(url)

    async def nodes(self, database: str | None = None) -> list[Postgres]:
        """Return the nodes, the coordinator first; with their own databases, or with that of a name."""
        if not self._nodes:
            async with self._connection() as connection:
                rows = await connection.fetch(NODES)
            self._nodes = [Postgres(self.url.set(host=host, port=port)) for host, port in rows]
        return [Postgres(node.url.set(database=database or node.url.database)) for node in self._nodes]

    async def _begin(self) -> None:
        """Open the session that shows that this run is alive, and drop the databases of killed runs."""
        plain = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._session = await asyncpg.connect(plain, server_settings={"application_name": self._run})
        async with self._alone():
            names = {name for node in await self.nodes() for name in await node.fetch(DATABASES) or []}
            runs = tuple(await self.fetch(RUNS))
            for name in names:
                if name[: len(self._run)] not in runs:
                    await self._drop(name)

    async def _drop(self, name: str) -> None:
        for node in await self.nodes():
            # PostgreSQL drops no database that has a prepared transaction.
            for gid in await node.fetch(PREPARED, name) or []:
                await Postgres(node.url.set(database=name)).execute(f"ROLLBACK PREPARED '{gid}'")
        await self._on_each_node(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    async def _close(self, url: str) -> None:
        """Let nobody connect to a database any more, Citus' own processes included: it becomes a template."""
        name = make_url(url).database
        await self._on_each_node(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false; {TERMINATE.format(name)}")

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Let other processes of the tests wait: Citus can't connect the nodes of two databases at a time."""
        async with self._connection() as connection:
            await connection.execute(f"SELECT pg_advisory_lock({ONE_AT_A_TIME})")
            yield

    async def _on_each_node(self, statement: str) -> None:
        calls: list[Coroutine[Any, Any, None]] = [node.execute(statement) for node in await self.nodes()]
        await asyncio.gather(*calls)

    async def _connect_nodes(self, name: str | None) -> None:
        coordinator, *workers = await self.nodes(name)
        for node in (coordinator, *workers):
            await node.execute("CREATE EXTENSION citus")
        await coordinator.fetch(ADD_COORDINATOR, coordinator.url.host, coordinator.url.port)
        for worker in workers:
            await coordinator.fetch(ADD_WORKER, worker.url.host, worker.url.port)


async def _copy(node: Postgres, template: str, name: str) -> None:
    try:
        await node.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    except asyncpg.ObjectInUseError:  # processes of Citus come back
        await node.execute(TERMINATE.format(template))
        await node.execute(f"CREATE DATABASE {name} TEMPLATE {template}")


async def distribute(url: str) -> None:
    """Distribute a migrated database."""
    await run(url, DISTRIBUTE.read_text())


async def run(url: str, statements: str) -> None:
    """Execute statements in a database."""
    await Postgres(make_url(url)).execute(statements)
