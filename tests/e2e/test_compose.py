"""The scripts, commands and environments of `docker compose up`, run in order without containers."""

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from sqlalchemy import URL, make_url

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.command import ROSTER, run, serving
from tests.support.postgres import PostgresServer, find_programs
from tests.support.server import FREE_PORT, serve

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
PASSWORDS = {"POSTGRES_PASSWORD": "aa00", "MIGRATOR_PASSWORD": "bb11", "SERVICE_PASSWORD": "cc22"}
# As in the image, but for its superuser, who has no password here.
WHO_COMES_IN = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for these tests alone, because databases share roles; it requires passwords."""
    with PostgresServer() as server:
        server.stop()
        (server._folder / "data/pg_hba.conf").write_text(WHO_COMES_IN)
        server.start()
        yield server


@pytest.fixture
async def database(postgres_server: PostgresServer) -> AsyncIterator[URL]:
    """A new database."""
    async with postgres_server.database() as url:
        yield make_url(url).set(drivername="postgresql")


def environment(service: str, database: URL) -> dict[str, str]:
    """Return the variables of a service, with passwords, for this database and a free port."""
    values: dict[str, Any] = dict(SERVICES[service]["environment"])
    for name, password in PASSWORDS.items():
        values = {key: str(value).replace(f"${{{name}:?}}", password) for key, value in values.items()}
    here = {
        "@database/roster": f"@{database.host}:{database.port}/{database.database}",
        "0.0.0.0:50051": "127.0.0.1:0",
    }
    for there, address in here.items():
        values = {key: value.replace(there, address) for key, value in values.items()}
    return values


async def prepare(database: URL) -> None:
    """Run the scripts in the order of the PostgreSQL image."""
    mounts = [mount.split(":") for mount in SERVICES["database"]["volumes"]]
    scripts = sorted((target, source) for source, target, *_ in mounts if "initdb.d" in target)
    assert len(scripts) == 2
    psql = find_programs("psql") / "psql"
    for _, source in scripts:
        ended = await run(
            *(psql, "--set=ON_ERROR_STOP=1", "--no-psqlrc", "--file", DEPLOY / source, str(database)),
            folder=DEPLOY,
            stdin=b"",
            **environment("database", database),
        )
        assert ended.status == 0, ended.err


async def test_services_start_in_order(database: URL, tmp_path: Path) -> None:
    """The migration and the server have different roles and passwords."""
    await prepare(database)
    migrate = environment("migrate", database)
    command = (ROSTER, *SERVICES["migrate"]["command"])
    refused = await run(*command, folder=tmp_path, stdin=b"", **mistyped(migrate))
    assert (refused.status, "password authentication failed" in refused.err) == (2, True)
    migrated = await run(*command, folder=tmp_path, stdin=b"", **migrate)
    assert (migrated.status, migrated.err) == (0, "")

    async with (
        serving(tmp_path, **environment("roster", database)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        request = CreateUserRequest(user=User(email="ada@example.org"))
        assert (await UserServiceStub(channel).CreateUser(request)).id == 1


def mistyped(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables with another password."""
    return {
        name: value.replace(PASSWORDS["MIGRATOR_PASSWORD"], "wrong") for name, value in environment.items()
    }


async def test_container_is_healthy_while_server_is_ready(sqlite_url: str) -> None:
    """Otherwise the check prints the reason: the server drains, or does not run."""

    async def check(address: str) -> tuple[int | None, str]:
        ended = await run(sys.executable, DEPLOY / "healthcheck.py", ROSTER_HEALTH_LISTEN=address)
        return ended.status, ended.err

    async with serve(sqlite_url, health_listen=FREE_PORT) as server:
        address = server.health_address
        assert await check(address) == (0, "")
        await server.health.enter_graceful_shutdown()
        assert await check(address) == (1, "not ready; the server's log says why\n")
    assert await check(address) == (1, "no answer: StatusCode.UNAVAILABLE\n")
