"""The command `roster` as a person starts it: what it says, what it refuses, and how it ends."""

import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import migrations
from service.settings import Settings
from tests.errors import refusal
from tests.postgres import Postgres
from tests.support.command import ROSTER, Ended, Serving, run, serving, waiting_to_serve

ADA = User(email="ada@example.org")


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


@pytest.mark.parametrize("command", [[ROSTER], [sys.executable, "-m", "service"]], ids=["roster", "module"])
async def test_help_lists_every_setting_with_its_default(command: list[str | Path], tmp_path: Path) -> None:
    """By the name that it has in the environment, however the command is started."""
    told = await run(*command, "serve", "--help", folder=tmp_path)

    assert told.out.startswith("Usage: roster serve ")
    listed = dict(re.findall(r"^ +ROSTER_(\w+) .* \[(.*)\]$", told.out, re.MULTILINE))
    defaults = {name.upper(): str(field.default) for name, field in Settings.model_fields.items()}
    readable = {"None": "unset", "": "unset", "False": "false", "7 days, 0:00:00": "P7D"}
    assert listed == {name: readable.get(default, default) for name, default in defaults.items()}


async def test_help_tells_each_command_in_a_line(tmp_path: Path) -> None:
    """Nothing is cut off in 80 columns, and the variables of a client are told."""
    commands = await run(ROSTER, "--help", folder=tmp_path, COLUMNS="80")
    load = await run(ROSTER, "load", "--help", folder=tmp_path)

    assert "..." not in commands.out.partition("Commands:")[2]
    assert {"ROSTER_ADDRESS", "ROSTER_TOKEN", "ROSTER_TLS_CA_FILE"} <= set(
        re.findall(r"ROSTER_\w+", load.out)
    )
    assert "127.0.0.1:50051" in load.out


@pytest.mark.parametrize("command", ["serve", "migrate"])
async def test_a_missing_folder_is_told(command: str, tmp_path: Path) -> None:
    """As `roster doctor` tells it."""
    ended = await run(ROSTER, command, folder=tmp_path, ROSTER_DATABASE_URL="sqlite:///no/roster.db")

    assert ended == Ended(2, "", "Error: there is no folder no; make it first\n")


async def test_the_setting_of_a_missing_file_is_named(tmp_path: Path) -> None:
    """Of all the files that there may be."""
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL_FILE="./nope")

    assert ended.status == 2
    assert ended.err.startswith("Error: ROSTER_DATABASE_URL_FILE: can't be read: ")


@pytest.mark.parametrize(("log_format", "is_told"), [("text", True), ("json", False)])
async def test_people_are_told_what_to_try(log_format: str, is_told: bool, tmp_path: Path) -> None:
    """A program that reads the log is not."""
    async with serving(tmp_path, ROSTER_LOG_FORMAT=log_format) as server:
        server.signal(signal.SIGTERM)
        ended = await server.ended()

    assert ("try, in another terminal" in ended.err) == is_told


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
    again = await run(ROSTER, "migrate", folder=tmp_path, DATABASE_URL=url)
    told = f"the schema is at revision {migrations.head()}\n"
    assert migrated == Ended(0, f"migrated from none: {told}", "")
    assert again == Ended(0, f"nothing was to be done: {told}", "")

    async with serving(tmp_path, DATABASE_URL=url) as server:
        assert (await create(server.address, ADA)).id == 1


async def test_a_revision_that_is_not_there_is_told(tmp_path: Path) -> None:
    """With those that are."""
    ended = await run(ROSTER, "migrate", "--down", "9999", folder=tmp_path)

    assert ended.status == 2
    assert ended.err.startswith("Error: this release has no revision 9999; it has base, 0001, ")


async def test_unknown_settings_are_told_at_the_start(tmp_path: Path) -> None:
    """One that is misspelt would be its default in silence."""
    async with waiting_to_serve(tmp_path, ROSTER_GRACEE="3") as server:
        await server.said("unknown setting ROSTER_GRACEE; did you mean ROSTER_GRACE?")


async def test_clients_read_the_file_of_settings_too(tmp_path: Path) -> None:
    """What the environment says goes before it."""
    async with serving(tmp_path) as server:
        (tmp_path / ".env").write_text(f"ROSTER_ADDRESS={server.address}\n")
        listed = await run(ROSTER, "loads", folder=tmp_path)
        elsewhere = await run(ROSTER, "loads", folder=tmp_path, ROSTER_ADDRESS="unix:/nowhere/roster.sock")

    assert listed.status == 0
    assert "no server answers at unix:/nowhere/roster.sock" in elsewhere.err


async def test_printed_sql_is_nothing_but_sql_and_is_not_run(empty_url: str, tmp_path: Path) -> None:
    """So that it can go to a DBA, or into a pipe."""
    printed = await run(ROSTER, "migrate", "--sql", folder=tmp_path, ROSTER_DATABASE_URL=empty_url)
    assert (printed.status, printed.err) == (0, "")
    assert printed.out.startswith("BEGIN;\n")
    assert printed.out.rstrip().endswith("COMMIT;")
    assert "CREATE TABLE users (" in printed.out

    engine = create_async_engine(empty_url)
    assert await migrations.current(engine) is None
    await engine.dispose()


async def test_a_database_that_is_away_is_waited_for_and_told(nowhere: str, tmp_path: Path) -> None:
    """Not for ever; with what to check, and without the password."""
    url = f"postgresql://ada:secret@{nowhere}/roster"
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=url, ROSTER_DATABASE_WAIT="0.6")

    assert (ended.status, ended.out) == (2, "")
    waited, told = ended.err.splitlines()
    assert "trying again in 0.5 s" in waited
    assert re.fullmatch(r"Error: the database can't be reached: .*; check ROSTER_DATABASE_URL", told)
    assert "secret" not in ended.err


async def test_a_file_that_is_no_database_is_told_in_one_line(tmp_path: Path) -> None:
    """Also where the server migrates by itself; the file is left alone."""
    (tmp_path / "roster.db").write_text("Dear diary")
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LOG_LEVEL="WARNING")

    assert ended == Ended(2, "", "Error: the schema was left as it was: file is not a database\n")
    assert (tmp_path / "roster.db").read_text() == "Dear diary"


async def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    """And the server that has it goes on."""
    async with serving(tmp_path) as server:
        second = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN=server.address)

        assert second.status == 2
        told = f"Error: can't listen on {server.address}; is another server there already?"
        assert second.err.splitlines()[-1].startswith(told)
        assert (await create(server.address, ADA)).email == ADA.email


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


@asynccontextmanager
async def open_load(server: Serving) -> AsyncIterator[Any]:
    """A bulk stream that the server has opened, and that waits for rows."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        load: Any = UserServiceStub(channel).BulkCreateUsers()
        await load.write(BulkCreateUsersRequest(options=BulkOptions()))
        assert (await load.read()).HasField("opened")
        yield load


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_streams_well(number: signal.Signals, tmp_path: Path) -> None:
    """A load is told how far it is, and that it can go on; then the command ends with status 0."""
    async with serving(tmp_path) as server, open_load(server) as load:
        await load.write(BulkCreateUsersRequest(users=[ADA]))
        assert (await load.read()).ack.created == 1
        server.signal(number)
        await server.said("stopping")

        assert (await load.read()).summary.next_offset == 1
        assert (await refusal(load.read())).reason == "DRAINING"
        assert (await server.ended()).status == 0
