"""The command `roster` as a person starts it: what it says, what it refuses, and how it ends."""

import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import migrations
from service.settings import Settings
from tests.e2e.command import ROSTER, Ended, run, serving
from tests.errors import refusal
from tests.postgres import Postgres

ADA = User(email="ada@example.org")
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
async def empty_url(postgres: Postgres) -> AsyncIterator[str]:
    """An empty database on PostgreSQL."""
    async with postgres.database() as url:
        yield url


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address of this machine where nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


async def create(address: str, user: User) -> User:
    async with grpc.aio.insecure_channel(address) as channel:
        return await UserServiceStub(channel).CreateUser(CreateUserRequest(user=user))


async def get(address: str, email: str) -> User:
    async with grpc.aio.insecure_channel(address) as channel:
        return await UserServiceStub(channel).GetUser(GetUserRequest(email=email))


async def test_the_module_is_the_command(tmp_path: Path) -> None:
    """Down to the name in its help."""
    command = await run(ROSTER, "--help", folder=tmp_path)
    module = await run(sys.executable, "-m", "service", "--help", folder=tmp_path)

    assert command.out.startswith("Usage: roster ")
    assert module == command


async def test_help_lists_every_setting_with_its_default(tmp_path: Path) -> None:
    """As the environment has it."""
    told = await run(ROSTER, "serve", "--help", folder=tmp_path)

    listed = re.findall(r"^ +ROSTER_(\w+) .* \[(.*)\]$", told.out, re.MULTILINE)
    assert dict(listed) == {
        name.upper(): str(field.default) for name, field in Settings.model_fields.items()
    }


async def test_every_wrong_setting_is_told_at_once(tmp_path: Path) -> None:
    """By the name of its variable, wherever it comes from, and without its value."""
    (tmp_path / ".env").write_text("ROSTER_GRACE=-1\nROSTER_POOL_SIZE=many\n")
    ended = await run(
        ROSTER,
        "serve",
        folder=tmp_path,
        ROSTER_LISTEN="0.0.0.0:50051",
        DATABASE_URL="mysql://ada:secret@127.0.0.1/roster",
    )

    assert ended.status == 2
    assert set(re.findall(r"ROSTER_\w+(?=: )", ended.err)) == {
        "ROSTER_LISTEN",
        "ROSTER_GRACE",
        "ROSTER_DATABASE_URL",
        "ROSTER_POOL_SIZE",
    }
    assert "secret" not in ended.err


async def test_a_schema_that_is_behind_is_refused_until_it_is_migrated(
    empty_url: str, tmp_path: Path
) -> None:
    """The refusal names the command that mends it."""
    url = empty_url.replace("postgresql+asyncpg://", "postgres://")
    refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN="127.0.0.1:0", DATABASE_URL=url)
    assert refused.status == 2
    assert "run `roster migrate`" in refused.err

    migrated = await run(ROSTER, "migrate", folder=tmp_path, DATABASE_URL=url)
    assert migrated == Ended(0, f"the schema is at revision {migrations.head()}\n", "")

    async with serving(tmp_path, DATABASE_URL=url) as server:
        assert (await create(server.address, ADA)).id == 1


async def test_printed_sql_is_nothing_but_sql_and_is_not_run(empty_url: str, tmp_path: Path) -> None:
    """So that it can go to a DBA, or into a pipe."""
    printed = await run(ROSTER, "migrate", "--sql", folder=tmp_path, ROSTER_DATABASE_URL=empty_url)
    assert (printed.status, printed.err) == (0, "")
    assert printed.out.startswith("BEGIN;\n")
    assert printed.out.rstrip().endswith("COMMIT;")
    assert "CREATE TABLE users (" in printed.out

    refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=empty_url)
    assert "the schema is at revision none" in refused.err


@pytest.mark.parametrize("command", ["serve", "migrate"])
async def test_a_database_that_is_away_is_told_in_one_line(
    command: str, nowhere: str, tmp_path: Path
) -> None:
    """Without its password, and without a traceback."""
    url = f"postgresql://ada:secret@{nowhere}/roster"
    ended = await run(ROSTER, command, folder=tmp_path, ROSTER_DATABASE_URL=url)

    assert ended.status == 2
    assert re.fullmatch(r"Error: the .*Connect call failed.*\n", ended.err)
    assert "secret" not in ended.err


async def test_a_file_that_is_no_database_is_told_in_one_line(tmp_path: Path) -> None:
    """Also where the server migrates by itself; the file is left alone."""
    (tmp_path / "roster.db").write_text("Dear diary")
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LOG_LEVEL="WARNING")

    assert ended == Ended(2, "", "Error: the schema was left as it was: file is not a database\n")
    assert (tmp_path / "roster.db").read_text() == "Dear diary"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:roster.sock"])
async def test_an_address_in_use_is_refused(listen: str, tmp_path: Path) -> None:
    """And the server that has it goes on."""
    async with serving(tmp_path, ROSTER_LISTEN=listen) as server:
        second = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN=server.address)
        assert second.status == 2
        assert f"can't listen on {server.address}" in second.err

        again = await run(ROSTER, "load", "users", "-", "--address", server.address, folder=tmp_path)
        assert again.status == 0


async def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    """`.env` in the folder in which the command is started."""
    (tmp_path / ".env").write_text(f"ROSTER_DATABASE_URL=sqlite:///ada.db\nROSTER_POOL_SIZE=1\n")
    async with serving(tmp_path):
        assert (tmp_path / "ada.db").exists()


async def test_what_was_stored_is_there_at_the_next_start(tmp_path: Path) -> None:
    """In `roster.db`, where the command was started; all that it says goes to standard error."""
    async with serving(tmp_path) as server:
        created = await create(server.address, ADA)
        server.signal(signal.SIGTERM)
        ended = await server.ended()
    assert (ended.status, ended.out) == (0, "")

    assert (tmp_path / "roster.db").exists()
    async with serving(tmp_path) as server:
        assert await get(server.address, ADA.email) == created


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_lets_calls_in_flight_be_finished(number: signal.Signals, tmp_path: Path) -> None:
    """A load that goes on after it gets its acks and its summary; then the command ends with status 0."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tmp_path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        load = UserServiceStub(channel).BulkCreateUsers()
        await load.write(BulkCreateUsersRequest(options=BulkOptions()))
        assert (await load.read()).HasField("opened")

        server.signal(number)
        await server.said("stopping")
        await load.write(BulkCreateUsersRequest(users=[ADA], finish=True))
        await load.done_writing()

        assert (await load.read()).ack.created == 1
        assert (await load.read()).summary.created == 1
        assert await load.read() is grpc.aio.EOF
        assert (await server.ended()).status == 0


async def test_a_call_that_outlasts_the_grace_is_ended(tmp_path: Path) -> None:
    """It does not keep the command from ending well."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tmp_path, ROSTER_GRACE="0.1"))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        load = UserServiceStub(channel).BulkCreateUsers()
        await load.write(BulkCreateUsersRequest(options=BulkOptions()))
        assert (await load.read()).HasField("opened")

        server.signal(signal.SIGTERM)
        refused = await refusal(load.read())
        print(refused.code, refused.message, refused.status)
        assert (await server.ended()).status == 0
        assert 0
