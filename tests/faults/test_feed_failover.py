"""The change feed when its database crashes, is promoted, or is restored in another cluster.

A crash keeps it, all else begins another one. `make test-failover` runs these tests, with their own clusters.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.v1.changes_pb2 import ListChangesRequest, WatchChangesRequest
from roster.v1.changes_pb2_grpc import ChangeServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, ExportUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.changes.reset import reset_feed
from service.db import migrations
from tests.support.errors import refusal
from tests.support.feed import Consumer, assert_begins_again
from tests.support.postgres import PostgresServer, find_programs
from tests.support.replication import Cluster, Node
from tests.support.server import serve

MIGRATED_SECONDS = 30
gated = pytest.mark.skipif(
    "ROSTER_TEST_FAILOVERS" not in os.environ, reason="run `make test-failover`: it needs clusters of its own"
)


def url_of(server: PostgresServer) -> str:
    """Return the URL of the database on a server."""
    return server.url.render_as_string(hide_password=False)


@asynccontextmanager
async def migrated(server: PostgresServer) -> AsyncIterator[Consumer]:
    """Migrate the database of a server, and yield a consumer of its feed."""
    await asyncio.to_thread(migrations.upgrade, url_of(server))
    consumer = Consumer(url_of(server))
    yield consumer
    await consumer.close()


@gated
async def test_crash_keeps_the_feed() -> None:
    """PostgreSQL recovers, and tokens stay valid."""
    with Node("node") as node:
        async with migrated(node) as consumer:
            tokens = [await consumer.token()]
            ids = [await consumer.add_user("ada")]
            tokens.append(await consumer.token())
            await asyncio.to_thread(node.stop, "immediate")
            await asyncio.to_thread(node.start)
        consumer = Consumer(url_of(node))
        ids.append(await consumer.add_user("alan"))
        assert [await consumer.changed_ids(token) for token in tokens] == [ids, ids[1:]]
        await consumer.close()


@gated
@pytest.mark.parametrize("is_planned", [True, False])
async def test_promotion_begins_again(*, is_planned: bool) -> None:
    """A running watch ends with FEED_RESET on each server; an export and a watch from its token are exact."""
    async with Cluster() as cluster:
        await asyncio.to_thread(migrations.upgrade, url_of(cluster.primary))
        async with (
            serve(cluster.url()) as first,
            serve(cluster.url()) as second,
            grpc.aio.insecure_channel(first.address) as channel,
            grpc.aio.insecure_channel(second.address) as other,
        ):
            users, changes = UserServiceStub(channel), ChangeServiceStub(channel)
            services = [changes, ChangeServiceStub(other)]
            watches = [service.WatchChanges(WatchChangesRequest()) for service in services]
            tokens = [(await next_response(watch)).token for watch in watches]
            await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
            tokens += [(await next_response(watch)).token for watch in watches]

            old = cluster.primary
            await asyncio.to_thread(old.stop if is_planned else old.kill)
            await cluster.promote(cluster.standbys[0])

            for watch in watches:
                assert (await refusal(drain(watch))).reason == "FEED_RESET"
            for service in services:
                for token in tokens:
                    listed = service.ListChanges(ListChangesRequest(token=token))
                    assert (await refusal(listed)).reason == "FEED_RESET"
            exported = [message async for message in users.ExportUsers(ExportUsersRequest())]
            assert [user.email for message in exported for user in message.users] == ["ada@example.org"]
            created = await users.CreateUser(CreateUserRequest(user=User(email="alan@example.org")))
            for service in services:
                request = WatchChangesRequest(token=exported[0].watch_token)
                response = await next_response(service.WatchChanges(request))
                assert [change.user.id for change in response.changes] == [created.id]


async def next_response(watch: Any) -> Any:
    """Return the next response of a watch."""
    async with asyncio.timeout(MIGRATED_SECONDS):
        response = await watch.read()
        assert response is not grpc.aio.EOF, watch.debug_error_string()
        return response


async def drain(watch: Any) -> None:
    """Read a watch to its end."""
    async with asyncio.timeout(MIGRATED_SECONDS):
        while await watch.read() is not grpc.aio.EOF:
            pass


@gated
async def test_backup_that_is_recovered_begins_again() -> None:
    """To its end, and to a point in time; the primary goes on, and keeps its feed."""
    with Node("node0") as primary:
        async with migrated(primary) as consumer:
            tokens = [await consumer.token()]
            await consumer.add_user("ada")
            tokens.append(await consumer.token())
            for target in ("", "immediate"):
                with Copy(primary, target) as copy:
                    await asyncio.to_thread(copy.promote)
                    await assert_begins_again(url_of(copy), tokens)
            assert not await consumer.is_reset(tokens[0])


class Copy(Node):
    """A base backup of a primary, which is recovered up to a target."""

    def __init__(self, primary: Node, target: str) -> None:
        self._target = target
        super().__init__("copy", primary)

    def _initialise(self, port: int, *, fsync: bool = False) -> None:
        super()._initialise(port, fsync=fsync)
        if self._target:
            (self.data / "standby.signal").rename(self.data / "recovery.signal")
            self.configure(recovery_target=f"'{self._target}'", restore_command="'false'")
            self.configure(recovery_target_action="pause")


@gated
async def test_copied_files_need_a_reset() -> None:
    """A snapshot of a disk looks like a crash. By itself it refuses only tokens of its future."""
    with Node("node0") as primary:
        async with migrated(primary) as consumer:
            before = await consumer.token()
            with SnapshotOf(primary) as copy:
                await consumer.add_user("ada")
                after = await consumer.token()
                restored = Consumer(url_of(copy))
                assert await restored.is_reset(after)
                assert not await restored.is_reset(before)
                await reset_feed(restored.database, is_forced=True)
                await restored.close()
                await assert_begins_again(url_of(copy), [before, after])


class SnapshotOf(Node):
    """A base backup of a primary, which is started as after a crash."""

    def __init__(self, primary: Node) -> None:
        super().__init__("snapshot", primary)

    def _initialise(self, port: int, *, fsync: bool = False) -> None:
        super()._initialise(port, fsync=fsync)
        for name in ("standby.signal", "backup_label"):
            (self.data / name).unlink()


@gated
async def test_dump_in_another_cluster_begins_again(tmp_path: Path) -> None:
    """One that has used fewer xids: the entries of the log seem to come from its future."""
    with PostgresServer() as old, PostgresServer() as new:
        async with migrated(old) as consumer:
            tokens = [await consumer.token()]
            for number in range(200):
                await consumer.add_user(f"user{number}")
            await consumer.execute("UPDATE users SET version = 2 WHERE id < 5")
            tokens.append(await consumer.token())
        source, target = (str(server.url.set(drivername="postgresql")) for server in (old, new))
        await run("pg_dump", f"--dbname={source}", f"--file={tmp_path}/dump")
        await run("psql", f"--dbname={target}", "--quiet", "--output=/dev/null", f"--file={tmp_path}/dump")
        await assert_begins_again(url_of(new), tokens)


async def run(program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs."""
    command = [str(find_programs(program) / program), *arguments]
    await asyncio.to_thread(lambda: subprocess.run(command, check=True))
