"""A Citus cluster for the tests: the one of `make test-citus`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import URL, make_url

from service.db import migrations
from tests.support.postgres import Postgres

DISTRIBUTE = Path(__file__).parents[2] / "deploy/sql/citus.sql"
NODES = "SELECT nodename, nodeport FROM pg_dist_node WHERE isactive ORDER BY groupid"
ADD_COORDINATOR = "SELECT citus_set_coordinator_host($1, $2)"
TESTS = 7238002
ADD_WORKER = "SELECT citus_add_node($1, $2)"


class CitusCluster(Postgres):
    """The cluster whose coordinator has the database of a URL; each database of a test is on all nodes.

    The tests must reach the workers under the names that the coordinator has for them, with the same role.
    """

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self._nodes: list[Postgres] = []

    async def create(self, template: str = "template1") -> str:
        """Create a database on all nodes: a copy of one of the cluster's, or an empty one."""
        url = await super().create(template)
        name = make_url(url).database
        for node in (await self.nodes())[1:]:
            await node.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        if template == "template1":
            await self._connect_nodes(name)
        return url

    async def drop(self, url: str) -> None:
        """Drop a database on all nodes."""
        name = make_url(url).database
        for node in await self.nodes():
            await node.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    @asynccontextmanager
    async def template(self) -> AsyncIterator[str]:
        """Yield the name of a database that is migrated and distributed, to be copied."""
        async with self._alone():
            url = await self.create()
            await asyncio.to_thread(migrations.upgrade, url)
            await distribute(url)
            await self._close(url)
        yield str(make_url(url).database)
        await self.drop(url)

    async def _close(self, url: str) -> None:
        """Let nobody connect to a database any more, Citus' own processes included: it becomes a template."""
        name = make_url(url).database
        for node in await self.nodes():
            await node.execute(
                f"ALTER DATABASE {name} ALLOW_CONNECTIONS false; "
                f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"
            )

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Let other processes of the tests wait: Citus can't connect the nodes of two databases at a time."""
        async with self._connection() as connection:
            await connection.execute(f"SELECT pg_advisory_lock({TESTS})")
            yield

    async def nodes(self) -> list[Postgres]:
        """Return the nodes, the coordinator first."""
        if not self._nodes:
            async with self._connection() as connection:
                rows = await connection.fetch(NODES)
            self._nodes = [Postgres(self.url.set(host=host, port=port)) for host, port in rows]
        return self._nodes

    async def _connect_nodes(self, name: str | None) -> None:
        coordinator, *workers = [Postgres(node.url.set(database=name)) for node in await self.nodes()]
        for node in (coordinator, *workers):
            await node.execute("CREATE EXTENSION citus")
        await coordinator.fetch(ADD_COORDINATOR, coordinator.url.host, coordinator.url.port)
        for worker in workers:
            await coordinator.fetch(ADD_WORKER, worker.url.host, worker.url.port)


async def distribute(url: str) -> None:
    """Distribute a migrated database."""
    await run(url, DISTRIBUTE.read_text())


async def run(url: str, statements: str) -> None:
    await Postgres(make_url(url)).execute(statements)
