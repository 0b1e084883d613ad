"""A named load of posts into a Citus cluster, while its server and a worker are killed.

    make test-citus-load ROWS=20000000 KILL_WORKER=…

The posts name their authors by e-mail. ROSTER_TEST_CITUS_URL is as for `make test-citus`. KILL_WORKER is a
command that kills a worker of the cluster and starts it again; without it, only the server is killed. At the
end, each row is in its shard once, and the load says so.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import click
from sqlalchemy import make_url

from roster.client import BulkLoader, channel
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOptions, GetBulkLoadRequest
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.posts_pb2 import BulkCreatePostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post
from tests.faults.crash import LOG_CHARACTERS, MortalServer
from tests.support.citus import CitusCluster

LOAD_ID = "twenty million posts"
USERS = 200_000
CONTENT = "some words of a post " * 5
KILLS = 4  # of the server, and then as many of the worker
RETRIES = 100
REPORT_SECONDS = 30
# Each number once: with the count, the sums of the numbers and of their squares are right only then.
CHECK = """
    SELECT count(*), sum(number), sum(number * number), count(*) FILTER (WHERE email = expected)
    FROM (
        SELECT title::numeric AS number, email, 'user' || title::bigint % $1 || '@example.org' AS expected
        FROM posts JOIN users ON users.id = author_id
    ) AS numbered
"""


class Trial:
    """Loads the rows through all kills."""

    def __init__(self, url: str, rows: int, kill_worker: str, log: Path) -> None:
        self.url = url
        self.rows = rows
        self.kill_worker = kill_worker
        self.server = MortalServer(url, log)
        self.acknowledged = 0
        self.began = time.monotonic()

    async def run(self) -> None:
        """Load, and check each row; raises AssertionError."""
        async with self.server.running(), asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(self._kill())
            reporting = tasks.create_task(self._report_forever())
            await self._load()
            killing.cancel()
            reporting.cancel()
            await self._check()

    async def _posts(self) -> AsyncIterator[Post]:
        for number in range(self.rows):
            email = f"user{number % USERS}@example.org"
            yield Post(title=str(number), content=CONTENT, author_email=email)

    async def _load(self) -> None:
        async with channel(self.server.address) as connection:
            await connection.channel_ready()
            loader = BulkLoader(
                PostServiceStub(connection).BulkCreatePosts,
                BulkCreatePostsRequest,
                BulkOptions(load_id=LOAD_ID),
                max_retries=RETRIES,
            )
            async for event in loader.run(self._posts()):
                if isinstance(event, BulkAck):
                    assert not event.failures
                    self.acknowledged = event.next_offset
        self._say(f"{self.rows:,} rows were acknowledged")

    async def _kill(self) -> None:
        for number in range(1, 2 * KILLS + 1):
            while self.acknowledged < self.rows * number // (2 * KILLS + 1):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            if number % 2:
                self._say("kill the server")
                await self.server.kill()
            elif self.kill_worker:
                self._say("kill a worker")
                process = await asyncio.create_subprocess_shell(self.kill_worker)
                assert await process.wait() == 0

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self._say(f"{self.acknowledged:,} rows acknowledged")

    async def _check(self) -> None:
        async with channel(self.server.address) as connection:
            load = await BulkServiceStub(connection).GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
        assert (load.state, load.next_offset, load.created, load.failed) == (
            BulkLoad.FINISHED,
            self.rows,
            self.rows,
            0,
        )
        driver: Any = await asyncpg.connect(self.url.replace("+asyncpg", ""))
        count, total, squares, authors = await driver.fetchrow(CHECK, USERS)
        await driver.close()
        last = self.rows - 1
        expected = (self.rows, last * self.rows // 2, last * self.rows * (2 * last + 1) // 6, self.rows)
        assert (count, total, squares, authors) == expected
        self._say(f"{count:,} posts are stored, each once, with its author")

    def _say(self, text: str) -> None:
        click.echo(f"{time.monotonic() - self.began:5.0f} s  {text}")


async def main(url: str, rows: int, kill_worker: str, log: Path) -> None:
    """Load into a new database of the cluster."""
    cluster = CitusCluster(make_url(url))
    async with cluster.template() as template, cluster.database(template) as database:
        driver: Any = await asyncpg.connect(database.replace("+asyncpg", ""))
        await driver.execute(
            "INSERT INTO users (email) "
            f"SELECT 'user' || number || '@example.org' FROM generate_series(0, {USERS - 1}) AS number"
        )
        await driver.close()
        try:
            await Trial(database, rows, kill_worker, log).run()
        except BaseException:
            click.echo((await asyncio.to_thread(log.read_text))[-LOG_CHARACTERS:], err=True)
            raise


if __name__ == "__main__":
    if not (cluster_url := os.environ.get("ROSTER_TEST_CITUS_URL")):
        sys.exit(
            "ROSTER_TEST_CITUS_URL is not set: it names a database of the coordinator of a Citus cluster"
        )
    with TemporaryDirectory() as folder:
        asyncio.run(
            main(
                cluster_url,
                int(os.environ.get("ROWS") or 1_000_000),
                os.environ.get("KILL_WORKER", ""),
                Path(folder) / "log",
            )
        )
