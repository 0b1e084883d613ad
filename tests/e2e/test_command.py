"""The command `roster` as its own process: help, errors, exit statuses, signals."""

import os
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
from service.db import revisions
from service.db.schema import read_schema
from service.settings import Settings
from tests.support.command import ROSTER, Ended, Serving, run, serving, waiting_to_serve
from tests.support.errors import refusal
from tests.support.postgres import Postgres

ADA = User(email="ada@example.org")


@pytest.fixture
async def empty_url(postgres: Postgres) -> AsyncIterator[str]:
    """An empty database on PostgreSQL."""
    async with postgres.database() as url:
        yield url


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address on this machine that does not answer."""
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
    """By its environment variable, however the command is started."""
    ended = await run(*command, "serve", "--help", folder=tmp_path)

    assert ended.out.startswith("Usage: roster serve ")
    unwrapped = re.sub(r"\n {10,}", " ", ended.out)
    listed = dict(re.findall(r"^ +ROSTER_(\w+) .* \[(.*)\]$", unwrapped, re.MULTILINE))
    defaults = {name.upper(): str(field.default) for name, field in Settings.model_fields.items()}
    readable = {"None": "unset", "": "unset", "False": "false", "7 days, 0:00:00": "P7D"}
    assert listed == {name: readable.get(default, default) for name, default in defaults.items()}


async def test_help_describes_each_command_in_one_line(tmp_path: Path) -> None:
    """Nothing is truncated in 80 columns; help lists the variables of clients, after a command's options."""
    commands = await run(ROSTER, "--help", folder=tmp_path, COLUMNS="80")
    load = await run(ROSTER, "load", "--help", folder=tmp_path)

    assert "..." not in commands.out.partition("Commands:")[2]
    assert {"ROSTER_ADDRESS", "ROSTER_TOKEN", "ROSTER_TLS_CA_FILE"} <= set(
        re.findall(r"ROSTER_\w+", load.out)
    )
    assert "127.0.0.1:50051" in load.out.partition("--batch-rows")[2]


@pytest.mark.parametrize("command", ["serve", "migrate", "doctor"])
@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("no/roster.db", "; an absolute path needs four slashes, as in sqlite:////var/lib/roster.db"),
        ("var/lib/roster.db", "; an absolute path needs four slashes, as in sqlite:////var/lib/roster.db"),
        ("/nowhere/roster.db", ""),
    ],
)
async def test_reports_a_missing_directory(command: str, path: str, hint: str, tmp_path: Path) -> None:
    """SQLite does not create directories; one slash too few makes a path relative."""
    ended = await run(ROSTER, command, folder=tmp_path, ROSTER_DATABASE_URL=f"sqlite:///{path}")

    assert ended.status == (1 if command == "doctor" else 2)
    folder = path.removesuffix("/roster.db")
    sentence = f"directory {folder} does not exist; create it first{hint}"
    assert (ended.out + ended.err).splitlines()[-1].endswith(sentence)


async def test_names_the_setting_of_a_missing_file(tmp_path: Path) -> None:
    """Several settings can name files."""
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL_FILE="./nope")

    assert ended.status == 2
    assert ended.err.startswith("Error: ROSTER_DATABASE_URL_FILE can't be read: ")


@pytest.mark.parametrize(("log_format", "is_printed"), [("text", True), ("json", False)])
async def test_suggests_commands_to_people(log_format: str, is_printed: bool, tmp_path: Path) -> None:
    """Not to programs that parse the log."""
    async with serving(tmp_path, ROSTER_LOG_FORMAT=log_format) as server:
        server.signal(signal.SIGTERM)
        ended = await server.ended()

    assert ("try in another terminal" in ended.err) == is_printed


async def test_reports_all_invalid_settings_at_once(tmp_path: Path) -> None:
    """By variable, whatever their source, and without values."""
    (tmp_path / ".env").write_text("ROSTER_GRACE=-1\nROSTER_POOL_SIZE=many\n")
    ended = await run(
        ROSTER,
        "serve",
        folder=tmp_path,
        ROSTER_LISTEN="0.0.0.0:50051",
        DATABASE_URL="mysql://ada:secret@127.0.0.1/roster",
    )

    assert ended.status == 2
    assert set(re.findall(r"ROSTER_\w+(?= has | should |: `)", ended.err)) == {
        "ROSTER_LISTEN",
        "ROSTER_GRACE",
        "ROSTER_DATABASE_URL",
        "ROSTER_POOL_SIZE",
    }
    assert "secret" not in ended.err


async def test_refuses_an_old_schema_until_it_is_migrated(empty_url: str, tmp_path: Path) -> None:
    """The error names the command to run."""
    url = empty_url.replace("postgresql+asyncpg://", "postgres://")
    refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN="127.0.0.1:0", DATABASE_URL=url)
    assert refused.status == 2
    assert "run `roster migrate`" in refused.err

    migrated = await run(ROSTER, "migrate", folder=tmp_path, DATABASE_URL=url)
    again = await run(ROSTER, "migrate", folder=tmp_path, DATABASE_URL=url)
    head = revisions.head()
    assert migrated == Ended(0, f"schema created at revision {head}\n", "")
    assert again == Ended(0, f"schema is up to date (revision {head})\n", "")

    async with serving(tmp_path, DATABASE_URL=url) as server:
        assert (await create(server.address, ADA)).id == 1


@pytest.mark.parametrize("setting", ["ROSTER_DATABASE_URL", "ROSTER_MIGRATION_URL"])
async def test_migrate_names_the_setting_of_an_unreachable_database(setting: str, tmp_path: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    (tmp_path / ".env").write_text(f"ROSTER_DATABASE_URL={url}\n{setting}={url}\n")
    ended = await run(ROSTER, "migrate", folder=tmp_path)

    assert ended.status == 2
    assert ended.err.startswith("Error: the database can't be reached: ")
    assert ended.err.endswith(f"; check {setting}\n")


async def test_reports_an_unknown_revision(tmp_path: Path) -> None:
    """The error lists the known ones."""
    ended = await run(ROSTER, "migrate", "--down", "9999", folder=tmp_path)

    assert ended.status == 2
    assert ended.err.startswith("Error: this release has no revision 9999; it has base, 0001, ")


async def test_warns_about_unknown_settings_at_start(tmp_path: Path) -> None:
    """A misspelt setting would silently keep its default."""
    async with waiting_to_serve(tmp_path, ROSTER_GRACEE="3") as server:
        await server.said("unknown setting ROSTER_GRACEE; did you mean ROSTER_GRACE?")


async def test_clients_read_the_env_file_too(tmp_path: Path) -> None:
    """The environment has precedence."""
    async with serving(tmp_path) as server:
        (tmp_path / ".env").write_text(f"ROSTER_ADDRESS={server.address}\n")
        listed = await run(ROSTER, "loads", folder=tmp_path)
        nested = await run(ROSTER, "users", "list", folder=tmp_path)
        elsewhere = await run(ROSTER, "loads", folder=tmp_path, ROSTER_ADDRESS="unix:/nowhere/roster.sock")

    assert (listed.status, nested.status) == (0, 0)
    assert "no server answers at unix:/nowhere/roster.sock" in elsewhere.err


@pytest.mark.parametrize("command", ["count users --filter", "loads show", "loads list --caller"])
async def test_refuses_an_argument_that_is_not_utf_8(command: str, tmp_path: Path) -> None:
    """No field of a request can carry it."""
    ended = await run(ROSTER, *command.split(), os.fsdecode(b"a\xff"), folder=tmp_path)

    assert ended == Ended(2, "", "Error: the argument a\\udcff is not UTF-8\n")


async def test_prints_sql_without_running_it(empty_url: str, tmp_path: Path) -> None:
    """The output is only SQL, so it can be piped."""
    printed = await run(ROSTER, "migrate", "--sql", folder=tmp_path, ROSTER_DATABASE_URL=empty_url)
    assert (printed.status, printed.err) == (0, "")
    assert printed.out.startswith("SET lock_timeout = '1s';\n\nBEGIN;\n")
    assert printed.out.rstrip().endswith("COMMIT;")
    assert "CREATE TABLE users (" in printed.out

    engine = create_async_engine(empty_url)
    assert (await read_schema(engine)).revision is None
    await engine.dispose()


async def test_waits_for_an_unreachable_database(nowhere: str, tmp_path: Path) -> None:
    """The wait is bounded; the error says what to check, without the password."""
    url = f"postgresql://ada:secret@{nowhere}/roster"
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=url, ROSTER_DATABASE_WAIT="0.6")

    assert (ended.status, ended.out) == (2, "")
    _, waited, error = ended.err.splitlines()
    assert "trying again in 0.5 s" in waited
    assert re.fullmatch(r"Error: the database can't be reached: .*; check ROSTER_DATABASE_URL", error)
    assert "secret" not in ended.err


async def test_reports_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    """The server, which migrates SQLite by itself, leaves the file unchanged."""
    (tmp_path / "roster.db").write_text("Dear diary")
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LOG_LEVEL="WARNING")

    assert (ended.status, ended.out) == (2, "")
    assert ended.err.splitlines()[1:] == ["Error: the migration failed: file is not a database"]
    assert (tmp_path / "roster.db").read_text() == "Dear diary"


async def test_refuses_a_port_in_use(tmp_path: Path) -> None:
    """The server that uses it is not affected."""
    async with serving(tmp_path) as server:
        second = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN=server.address)

        assert second.status == 2
        error = f"Error: can't listen on {server.address}; is another server listening there?"
        assert second.err.splitlines()[-1].startswith(error)
        assert (await create(server.address, ADA)).email == ADA.email


async def test_keeps_data_across_restarts(tmp_path: Path) -> None:
    """The data is in `roster.db` in the working directory; messages go to standard error."""
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
    """Yield an open bulk stream without rows."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        load: Any = UserServiceStub(channel).BulkCreateUsers()
        await load.write(BulkCreateUsersRequest(options=BulkOptions()))
        assert (await load.read()).HasField("opened")
        yield load


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_streams_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    """The stream gets its progress and a retryable error; the exit status is 0."""
    async with serving(tmp_path) as server, open_load(server) as load:
        await load.write(BulkCreateUsersRequest(users=[ADA]))
        assert (await load.read()).ack.created == 1
        server.signal(number)
        await server.said("stopping")

        assert (await load.read()).summary.next_offset == 1
        assert (await refusal(load.read())).reason == "DRAINING"
        assert (await server.ended()).status == 0
