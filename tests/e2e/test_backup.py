"""The backup commands of docs/operating.md, run against running servers."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from sqlalchemy import URL

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.command import ROSTER, run, serving
from tests.support.postgres import PostgresServer, find_programs

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs/operating.md").read_text()
ROLES = CHECKOUT / "deploy/sql/roles.sql"


def block(title: str) -> str:
    """Return the commands under a heading."""
    [commands] = re.findall(rf"^```sh\n# {title}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(commands)


async def run_commands(commands: str, folder: Path, **environment: str) -> None:
    """Run commands in a folder; all must succeed."""
    ended = await run("sh", "-ec", commands, folder=folder, stdin=b"", **environment)
    assert ended.status == 0, ended.err


async def create(address: str, email: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await UserServiceStub(channel).CreateUser(CreateUserRequest(user=User(email=email)))


async def emails(address: str) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        return [user.email for user in (await UserServiceStub(channel).ListUsers(ListUsersRequest())).users]


async def test_restores_sqlite_from_its_backup(tmp_path: Path) -> None:
    """The backup is taken while the server runs, and has commits that are only in the log."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    async with serving(tmp_path) as server:
        await create(server.address, "ada@example.org")
        await run_commands(block("backup on SQLite"), tmp_path, PATH=path)
        await create(server.address, "alan@example.org")
    assert (tmp_path / "roster.db-wal").exists()  # it was killed

    await run_commands(block("restore on SQLite"), tmp_path)
    async with serving(tmp_path) as server:
        assert await emails(server.address) == ["ada@example.org"]


@pytest.fixture
def libpq() -> Iterator[dict[str, str]]:
    """The environment for the programs of PostgreSQL, which connect to a server of the tests."""
    with PostgresServer() as server:
        programs = find_programs("createdb", "createuser", "pg_dump", "pg_restore", "psql")
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        yield {"PGHOST": "127.0.0.1", "PGPORT": str(server.url.port), "PGUSER": "postgres", "PATH": path}


async def test_restores_postgresql_from_its_backup(libpq: dict[str, str], tmp_path: Path) -> None:
    """In another database, with the same rights for both roles and no others."""

    def url(role: str, database: str) -> dict[str, str]:
        place = URL.create("postgresql", role, None, libpq["PGHOST"], int(libpq["PGPORT"]), database)
        return {"ROSTER_DATABASE_URL": str(place)}

    (tmp_path / "deploy").symlink_to(CHECKOUT / "deploy")
    await run_commands(f"createdb roster; psql --quiet --file={ROLES} roster", tmp_path, **libpq)
    await run_commands(f"{ROSTER} migrate", tmp_path, **url("roster_migrator", "roster"))
    async with serving(tmp_path, **url("roster_service", "roster")) as server:
        await create(server.address, "ada@example.org")
        await run_commands(block("backup on PostgreSQL"), tmp_path, **libpq)
        await create(server.address, "alan@example.org")

    await run_commands(block("restore on PostgreSQL"), tmp_path, **libpq)
    await run_commands(f"{ROSTER} migrate", tmp_path, **url("roster_migrator", "restored"))
    async with serving(tmp_path, **url("roster_service", "restored")) as server:
        assert await emails(server.address) == ["ada@example.org"]
        await create(server.address, "grace@example.org")
    await run_commands("createuser stranger", tmp_path, **libpq)
    refused = await run("psql", "--username=stranger", "restored", folder=tmp_path, stdin=b"", **libpq)
    assert "permission denied for database" in refused.err
