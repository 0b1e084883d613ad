"""A rolling upgrade from the previous release to this one, under traffic, on one PostgreSQL."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from roster.client import channel
from roster.v1.changes_pb2 import Change, ListChangesRequest
from roster.v1.changes_pb2_grpc import ChangeServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import ExportUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.command import ended
from tests.support.releases import Release, Slot, install_previous
from tests.support.traffic import Traffic, stored_users

# `make test` stops servers as an orchestrator does; `make test-upgrade` also kills them, several times.
ROUNDS = int(os.environ.get("ROSTER_TEST_UPGRADES", "0"))
STOPS = [signal.SIGTERM, *[signal.SIGTERM, signal.SIGKILL] * ROUNDS]
MIGRATIONS_LOCK = 7238001
WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE 'SELECT pg_try_advisory_lock%'
"""


@pytest.fixture
def url(empty_postgresql_url: str) -> str:
    """An empty database on PostgreSQL."""
    return empty_postgresql_url


@pytest.fixture
def previous(url: str, tmp_path: Path) -> Release:
    """The previous release; without the history of this repository, there is none to test."""
    try:
        packages = install_previous()
    except FileNotFoundError as missing:
        pytest.skip(f"NOT TESTED: upgrades from the previous release. {missing}")
    return Release(tmp_path, url, packages)


@pytest.fixture
def current(url: str, tmp_path: Path) -> Release:
    """The release of this checkout."""
    return Release(tmp_path, url)


@asynccontextmanager
async def other_migration(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Hold the lock of migrations, as another `roster migrate` does; yield a connection."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(plain)
    try:
        await connection.execute(f"SELECT pg_advisory_lock({MIGRATIONS_LOCK})")
        yield connection
    finally:
        await connection.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.name)
async def test_upgrades_and_returns_without_a_failed_call(
    stop: signal.Signals, url: str, previous: Release, current: Release
) -> None:
    """Servers of both releases come and go before, during and after the migration, and once more after it."""
    first, second = Slot(stop), Slot(stop)
    target = f"ipv4:{first.address},{second.address}"
    assert (await previous.run("migrate")).status == 0
    try:
        await first.replace(previous)
        await second.replace(previous)
        async with Traffic(target) as traffic:
            await traffic.progress()
            refused = await current.run("serve", ROSTER_LISTEN="127.0.0.1:0", ROSTER_METRICS_LISTEN="")
            assert refused.status
            assert "run `roster migrate`" in refused.err
            await first.replace(previous)
            await traffic.progress()

            async with other_migration(url) as connection:
                migration = await current.start("migrate")
                while not await connection.fetchval(WAITING):
                    assert migration.returncode is None
                    await asyncio.sleep(0.05)
                await traffic.progress()
                await second.replace(previous)
                await traffic.progress()
            migrated = await ended(migration)
            assert migrated.status == 0, migrated.err
            assert "--contract" in migrated.out

            await second.replace(current)
            copy = await Copy.export(second.address)
            await traffic.progress()
            await first.replace(previous)
            await second.replace(current)
            await traffic.progress()

            too_early = await current.run("migrate", "--contract")
            assert too_early.status
            await first.replace(current)
            contracted = await current.run("migrate", "--contract")
            assert contracted.status == 0, contracted.err
            await first.replace(current)
            await second.replace(current)
            await traffic.progress()

        await check(target, traffic, copy)
        await first.stop()
        await second.stop()
        returned = await current.run("migrate", "--down", "0002")
        assert returned.status == 0, returned.err
        await first.replace(previous)
        await check(first.address, traffic)
    finally:
        await first.stop()
        await second.stop()


class Copy:
    """The users of an export, and the changes since it began."""

    def __init__(self) -> None:
        self._users: dict[int, User] = {}
        self._token = ""

    @classmethod
    async def export(cls, target: str) -> "Copy":
        """Export all users from a server."""
        copy = cls()
        async with channel(target) as connection:
            async for page in UserServiceStub(connection).ExportUsers(ExportUsersRequest()):
                copy._token = copy._token or page.watch_token
                copy._users |= {user.id: user for user in page.users}
        assert copy._token
        return copy

    async def catch_up(self, target: str) -> dict[str, User]:
        """Apply all changes, and return the users by e-mail."""
        async with channel(target) as connection:
            changes, has_more = ChangeServiceStub(connection), True
            while has_more:
                request = ListChangesRequest(token=self._token, entities=[Change.USERS], page_size=1000)
                page = await changes.ListChanges(request)
                for change in page.changes:
                    self._users.pop(change.user.id or change.deleted_user_id, None)
                    if change.HasField("user"):
                        self._users[change.user.id] = change.user
                self._token, has_more = page.token, page.has_more
        return {user.email: user for user in self._users.values()}


async def check(target: str, traffic: Traffic, copy: Copy | None = None) -> None:
    """Check that each row that was sent is stored exactly once, and that a copy equals the users.

    It also has the changes that servers of the previous release have written.
    """
    users = await stored_users(target)
    assert copy is None or await copy.catch_up(target) == users
    called = {f"call{number}@example.org" for number in range(traffic.created)}
    loaded = {f"row{number}@example.org" for number in range(traffic.loaded)}
    assert users.keys() == called | loaded
    ids = [id for ack in traffic.acks for id in ack.ids]
    assert ids == [users[f"row{number}@example.org"].id for number in range(traffic.loaded)]
