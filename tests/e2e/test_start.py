"""The start of `serve`, and the other commands, with a database that fails, or that is not the right one."""

import asyncio
import json
import os
import re
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import revisions
from tests.support.command import ROSTER, Ended, run, serving, waiting_to_serve
from tests.support.fake_postgres import (
    Conversation,
    close,
    close_after_startup,
    close_in_first_statement,
    fail_tls,
    fake_postgres,
    hang,
    have_no_version,
    refuse,
    send_garbage,
    speak_http,
)
from tests.support.load_stream import load_once, named
from tests.support.users import list_users

URL = "postgresql://ada:s3cret@{host}/roster"

# What a database, a proxy or something else on its port does while it is not ready yet.
PASSING: dict[str, Conversation] = {
    "closes": close,
    "hangs": hang,
    "closes after the startup message": close_after_startup,
    "speaks HTTP": speak_http,
    "sends garbage": send_garbage,
    "breaks off TLS": fail_tls,
    "closes in the first statement": close_in_first_statement,
    "has no version": have_no_version,
    "starts up": refuse("57P03", "the database system is starting up"),
    "shuts down": refuse("57P01", "terminating connection due to administrator command"),
    "has too many connections": refuse("53300", "sorry, too many clients already"),
    "is a proxy without a server": refuse("08P01", "server login has been failing"),
}
# What it does if waiting can't help.
PERMANENT: dict[str, Conversation] = {
    "28P01": refuse("28P01", 'password authentication failed for user "ada"'),
    "28000": refuse("28000", "no pg_hba.conf entry for host"),
    "3D000": refuse("3D000", 'database "roster" does not exist'),
    "42704": refuse("42704", 'unrecognized configuration parameter "geqoo"'),
    "XX000": refuse("XX000", "Tenant or user not found"),
}


# Failures that PostgreSQL itself reports, in a connection that was made.
REFUSALS = {"starts up", "shuts down", "has too many connections", *PERMANENT}


async def serve(folder: Path, host: str, wait: str, **environment: Any) -> Ended:
    """Run `roster serve` with the database at this host, until it gives up."""
    settings: dict[str, Any] = {
        "ROSTER_LISTEN": "127.0.0.1:0",
        "ROSTER_METRICS_LISTEN": "",
        "ROSTER_CONNECT_TIMEOUT": "0.3",
    }
    settings |= {"ROSTER_DATABASE_URL": URL.format(host=host), "ROSTER_DATABASE_WAIT": wait}
    return await run(ROSTER, "serve", folder=folder, **settings | environment)


def check_error(ended: Ended) -> str:
    """Check that a command ended with one sentence, and return it."""
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert "s3cret" not in ended.err
    error = ended.err.splitlines()[-1]
    failure = "the database (can't be reached|refused the connection)"
    assert re.fullmatch(rf"Error: {failure}: .+; check ROSTER_DATABASE_URL", error)
    return error


@pytest.mark.parametrize("failure", PASSING)
async def test_waits_for_a_database_that_is_not_ready(failure: str, tmp_path: Path) -> None:
    """Whatever point of the first connection fails."""
    async with fake_postgres(PASSING[failure]) as port:
        await check_wait(tmp_path, URL.format(host=f"127.0.0.1:{port}"))


async def check_wait(folder: Path, url: str) -> None:
    """Check that a server tries again, and that a signal ends its wait."""
    settings: dict[str, Any] = {"ROSTER_DATABASE_WAIT": "1000", "ROSTER_CONNECT_TIMEOUT": "0.3"}
    async with waiting_to_serve(folder, ROSTER_DATABASE_URL=url, **settings) as server:
        await server.said("trying again in 0.5 s")
        server.signal(signal.SIGTERM)
        ended = await server.ended()
    assert ended.status == 0
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid", "/nowhere"])
async def test_waits_for_a_host_that_can_t_be_reached(host: str, tmp_path: Path) -> None:
    """A refused port, an unknown name, a socket that does not exist yet."""
    url = f"postgresql:///roster?host={host}" if host.startswith("/") else URL.format(host=host)
    await check_wait(tmp_path, url)


async def test_wait_ends_with_the_cause(tmp_path: Path) -> None:
    """In one sentence that says what to check."""
    async with fake_postgres(PASSING["starts up"]) as port:
        error = check_error(await serve(tmp_path, f"127.0.0.1:{port}", "0.6"))

    assert error == (
        "Error: the database refused the connection: the database system is starting up; check "
        "ROSTER_DATABASE_URL"
    )


@pytest.mark.parametrize("code", PERMANENT)
async def test_reports_at_once_what_waiting_can_t_change(code: str, tmp_path: Path) -> None:
    """Not after the wait, which is longer than this test may take."""
    async with fake_postgres(PERMANENT[code]) as port:
        ended = await serve(tmp_path, f"127.0.0.1:{port}", "1000")

    error = check_error(ended)
    assert "trying again" not in ended.err
    assert ("create the database first" in error) == (code == "3D000")


async def test_connection_without_a_time_limit_is_given_up(tmp_path: Path) -> None:
    """A URL with connect_timeout=0 has no limit of its own; a signal ends the wait, too."""
    connected = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await hang(reader, writer)

    async with fake_postgres(converse) as port:
        url = f"{URL.format(host=f'127.0.0.1:{port}')}?connect_timeout=0"
        async with waiting_to_serve(tmp_path, ROSTER_DATABASE_URL=url) as server:
            await connected.wait()
            server.signal(signal.SIGTERM)
            ended = await server.ended()

    assert ended.status == 0


async def test_starts_once_the_database_is_ready(postgresql_url: str, tmp_path: Path) -> None:
    """Its first connections fail in different ways."""
    url = make_url(postgresql_url)
    failures = iter([close, refuse("57P03", "the database system is starting up"), close_after_startup])

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if failure := next(failures, None):
            await failure(reader, writer)
            return
        source, target = await asyncio.open_connection(url.host, url.port)
        await asyncio.gather(copy(reader, target), copy(source, writer))

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while chunk := await source.read(65536):
                target.write(chunk)
        finally:
            target.close()

    async with fake_postgres(converse) as port:
        own = url.set(port=port).render_as_string(hide_password=False)
        async with serving(tmp_path, ROSTER_DATABASE_URL=own) as server:
            assert await is_serving(server.address)


async def is_serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await HealthStub(channel).Check(HealthCheckRequest())
        return bool(answer.status == HealthCheckResponse.SERVING)


# One of each kind: how a failure is recognised does not depend on the command.
@pytest.mark.parametrize("failure", ["hangs", "speaks HTTP", "starts up", "28P01"])
async def test_other_commands_report_the_same_in_a_sentence(failure: str, tmp_path: Path) -> None:
    """`doctor` as a failed check with status 1, `migrate` as an error with status 2."""
    async with fake_postgres((PASSING | PERMANENT)[failure]) as port:
        url = f"{URL.format(host=f'127.0.0.1:{port}')}?connect_timeout=1"
        settings: dict[str, Any] = {
            "ROSTER_DATABASE_URL": url,
            "ROSTER_LISTEN": "127.0.0.1:0",
            "ROSTER_METRICS_LISTEN": "",
        }
        doctor = await run(ROSTER, "doctor", folder=tmp_path, **settings)
        migrate = await run(ROSTER, "migrate", folder=tmp_path, **settings)

    assert (doctor.status, doctor.err) == (1, "")
    failure = "refused the connection" if failure in REFUSALS else "can't be reached"
    assert doctor.out.splitlines()[-1].startswith(f"FAIL  database  the database {failure}: ")
    assert migrate.status == 2
    assert len(migrate.err.splitlines()) == 1
    assert migrate.err.startswith("Error: the ")


@pytest.fixture
async def engine(postgresql_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine on the migrated database."""
    engine = create_async_engine(postgresql_url)
    yield engine
    await engine.dispose()


async def execute(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def test_read_only_database_is_not_served(
    postgresql_url: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    """It may be a standby that is about to be promoted, so the start waits for it."""
    name = make_url(postgresql_url).database
    await execute(engine, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await check_wait(tmp_path, postgresql_url)
    ended = await serve(tmp_path, "", "0", ROSTER_DATABASE_URL=postgresql_url)
    doctor = await run(ROSTER, "doctor", folder=tmp_path, ROSTER_DATABASE_URL=postgresql_url)

    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("Error: the database is read-only: it is a standby, or ")
    assert "FAIL  database  the database is read-only" in doctor.out


DAMAGE = {
    "DROP TABLE posts": "lacks the table posts",
    "ALTER TABLE users DROP COLUMN full_name": "lacks the column users.full_name",
    "DROP TABLE schema_compatibility": "lacks the table schema_compatibility",
}


@pytest.mark.parametrize("statement", DAMAGE)
async def test_missing_tables_and_columns_are_named(
    statement: str, postgresql_url: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    """Although the revision is right."""
    await execute(engine, statement)
    started = await serve(tmp_path, "", "0", ROSTER_DATABASE_URL=postgresql_url)
    settings: dict[str, Any] = {"ROSTER_DATABASE_URL": postgresql_url, "ROSTER_LISTEN": "127.0.0.1:0"}
    doctor = await run(ROSTER, "doctor", folder=tmp_path, **settings)

    assert [started.status, doctor.status] == [2, 1]
    for printed in (started.err, doctor.out):
        (line,) = (line for line in printed.splitlines() if "lacks" in line)
        assert DAMAGE[statement] in line
        assert "restore a backup" in line


async def test_migrate_names_what_is_missing(
    postgresql_url: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    """It is not an error: a developer changes a model before there is a migration."""
    await execute(engine, "ALTER TABLE users DROP COLUMN full_name")
    migrate = await run(ROSTER, "migrate", folder=tmp_path, ROSTER_DATABASE_URL=postgresql_url)

    assert (migrate.status, migrate.out) == (0, f"schema is up to date (revision {revisions.head()})\n")
    assert "lacks the column users.full_name" in migrate.err


async def test_missing_column_of_sqlite_is_named(sqlite_url: str, tmp_path: Path) -> None:
    """SQLite files are copied around, too."""
    file = make_url(sqlite_url).database or ""
    with sqlite3.connect(file) as connection:
        connection.execute("ALTER TABLE users RENAME COLUMN full_name TO name")
    connection.close()
    started = await serve(tmp_path, "", "0", ROSTER_DATABASE_URL=sqlite_url)

    assert started.status == 2
    assert "lacks the column users.full_name" in started.err.splitlines()[-1]


# The modes of the directory, of the database and of its log, and what the error names.
PROTECTED = {
    "database": (0o777, 0o444, 0o666, "file roster.db can't"),
    "log": (0o777, 0o666, 0o444, "file roster.db-wal can't"),
    "directory": (0o555, 0o666, 0o666, "directory {folder} can't"),
    "empty directory": (0o555, None, None, "directory {folder} can't"),
}


@pytest.fixture
def protected(request: pytest.FixtureRequest, sqlite_template: Path) -> Iterator[tuple[Path, str]]:
    """A directory in which SQLite can't write, and what an error says about it."""
    mode, *modes, words = PROTECTED[request.param]
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for suffix, file_mode in zip(("", "-wal"), modes, strict=True):
            if file_mode is not None:
                file = folder / f"roster.db{suffix}"
                file.write_bytes(b"" if suffix else sqlite_template.read_bytes())
                file.chmod(file_mode)
        folder.chmod(mode)
        yield folder, words.format(folder=folder)
        folder.chmod(0o700)


@pytest.mark.parametrize(
    ("protected", "command"),
    [*((problem, "serve") for problem in PROTECTED), ("directory", "migrate"), ("database", "doctor")],
    indirect=["protected"],
)
async def test_database_that_sqlite_can_t_write_is_not_served(
    protected: tuple[Path, str], command: str
) -> None:
    """Found before the first write, by every command that uses the database."""
    folder, words = protected
    # Root may write everywhere, so a server of root runs as somebody else.
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    settings: dict[str, Any] = {"ROSTER_LISTEN": "127.0.0.1:0", "ROSTER_METRICS_LISTEN": ""}
    ended = await run(*other, ROSTER, command, folder=folder, **settings)

    problem = ended.out if command == "doctor" else ended.err.splitlines()[-1]
    assert ended.status == (1 if command == "doctor" else 2)
    assert words in problem
    assert "listening" not in ended.err
    assert "ok    database" not in ended.out


@pytest.mark.parametrize("query", ["mode=ro&uri=true", "immutable=1&uri=true"])
async def test_url_that_opens_sqlite_read_only_is_not_served(
    query: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The error names the parameters."""
    url = f"sqlite:///file:{make_url(sqlite_url).database}?{query}"
    started = await serve(tmp_path, "", "0", ROSTER_DATABASE_URL=url)
    doctor = await run(ROSTER, "doctor", folder=tmp_path, ROSTER_DATABASE_URL=url)

    assert started.status == 2
    assert "remove mode=ro and immutable from ROSTER_DATABASE_URL" in started.err.splitlines()[-1]
    assert "FAIL  database  the URL opens the database read-only" in doctor.out


async def test_two_servers_can_use_one_sqlite_file(tmp_path: Path) -> None:
    """Each sees what the other has written, and no id is used twice."""
    async with (
        serving(tmp_path) as first,
        serving(tmp_path) as second,
        grpc.aio.insecure_channel(first.address) as one,
        grpc.aio.insecure_channel(second.address) as other,
    ):
        clients = UserServiceStub(one), UserServiceStub(other)
        created = await asyncio.gather(
            *(
                users.CreateUser(CreateUserRequest(user=User(email=f"{server}-{number}@example.org")))
                for number in range(20)
                for server, users in enumerate(clients)
            )
        )
        loaded = await asyncio.gather(
            *(
                load_once(
                    users.BulkCreateUsers,
                    BulkCreateUsersRequest(users=named(f"a{server}", f"b{server}"), finish=True),
                )
                for server, users in enumerate(clients)
            )
        )
        listed = [await list_users(users) for users in clients]

    assert len({user.id for user in created}) == 40
    assert [ack.created for ack in loaded] == [2, 2]
    assert listed[0] == listed[1]
    assert len(listed[0]) == 44


async def test_tables_in_another_schema_are_found(
    postgresql_url: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    """With the search path they can be used."""
    await execute(engine, "ALTER SCHEMA public RENAME TO app", "CREATE SCHEMA public")
    started = await serve(tmp_path, "", "0", ROSTER_DATABASE_URL=postgresql_url)
    error = started.err.splitlines()[-1]
    parameter = re.search(r"add (options=\S+)", error)

    assert "Roster's tables are in the schema app, which this role does not search" in error
    assert parameter
    async with serving(tmp_path, ROSTER_DATABASE_URL=f"{postgresql_url}?{parameter[1]}") as server:
        assert await is_serving(server.address)


async def test_start_says_which_database_it_serves(postgresql_url: str, tmp_path: Path) -> None:
    """At every log level, and without the password."""
    url = make_url(postgresql_url).set(password="s3cret")
    ended = await serve(
        tmp_path,
        "",
        "0",
        ROSTER_DATABASE_URL=url.set(database="x").render_as_string(False),
        ROSTER_LOG_LEVEL="error",
    )
    sqlite = await serve(
        tmp_path, "", "0", ROSTER_DATABASE_URL="sqlite:///own.db", ROSTER_LISTEN="unix:/nowhere/roster"
    )

    assert ended.err.splitlines()[0] == f"database: postgresql://{url.username}@{url.host}:{url.port}/x"
    assert sqlite.err.splitlines()[0] == f"database: SQLite, {tmp_path}/own.db"
    assert "s3cret" not in ended.err


NAMES: dict[str, Any] = {
    "DB_URL": "postgresql://ada:s3cret@db/roster",
    "PGHOST": "db",
    "PGDATABASE": "roster",
    "POSTGRES_HOST": "db",
    "DATABASE_URI": "sqlite:///other.db",
    "SQLALCHEMY_DATABASE_URI": "sqlite:///other.db",
    "MY_APP_STORE": "postgres://ada:s3cret@db/roster",
    "JDBC_DATABASE_URL": "jdbc:postgresql://db/roster?password=s3cret",
}


async def test_unread_database_variables_are_named(tmp_path: Path) -> None:
    """If none that is read is set; their values are not repeated."""
    empty = {"PGSERVICE": "", "ROSTER_DATABASE_URL": ""}
    async with serving(tmp_path, ROSTER_DB_URL="sqlite:///x.db", **NAMES, **empty) as server:
        server.signal(signal.SIGTERM)
        ended = await server.ended()
    doctor = await run(ROSTER, "doctor", folder=tmp_path, ROSTER_LISTEN="127.0.0.1:0", **NAMES)
    other = await run(ROSTER, "doctor", folder=tmp_path, ROSTER_DATABASE_URL="sqlite:///x.db", **NAMES)

    assert ended.status == 0
    assert doctor.status == 1
    for name in NAMES:
        assert f"{name} is set, but not read; set ROSTER_DATABASE_URL" in doctor.out
        assert f"{name} is set" not in other.out
    assert "s3cret" not in doctor.out


async def test_start_warns_about_unread_database_variables(tmp_path: Path) -> None:
    """As for unknown settings."""
    ended = await run(
        ROSTER,
        "serve",
        folder=tmp_path,
        ROSTER_LISTEN="x.invalid:1",
        ROSTER_INSECURE="1",
        ROSTER_DB_URL="x",
        **NAMES,
    )
    warnings = [json.loads(line)["message"] for line in ended.err.splitlines() if '"WARNING"' in line]

    assert "unknown setting ROSTER_DB_URL; did you mean ROSTER_DATABASE_URL?" in warnings
    assert {line.partition(" ")[0] for line in warnings if "is set, but not read" in line} >= NAMES.keys()


async def test_start_warns_about_ignored_parameters(postgresql_url: str, tmp_path: Path) -> None:
    """It serves; the parameters are those of Supabase and Prisma."""
    url = f"{postgresql_url}?pgbouncer=true&connection_limit=1"
    doctor = await run(
        ROSTER, "doctor", folder=tmp_path, ROSTER_LISTEN="127.0.0.1:0", ROSTER_DATABASE_URL=url
    )

    assert doctor.status == 0
    assert "the parameter pgbouncer of the database URL is ignored" in doctor.out
    assert "the parameter connection_limit of the database URL is ignored: ROSTER_POOL_SIZE" in doctor.out


@pytest.mark.parametrize("host", ["", "*"])
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_empty_host_means_all_interfaces(
    host: str, workers: str, postgresql_url: str, tmp_path: Path
) -> None:
    """For calls, health and metrics; over IPv4 and, if the machine has it, IPv6."""
    settings: dict[str, Any] = {
        "ROSTER_DATABASE_URL": postgresql_url,
        "ROSTER_WORKERS": workers,
        "ROSTER_INSECURE": "true",
    }
    listen = dict.fromkeys(("ROSTER_LISTEN", "ROSTER_HEALTH_LISTEN", "ROSTER_METRICS_LISTEN"), f"{host}:0")
    async with serving(tmp_path, **settings, **listen) as server:
        port = server.address.rpartition(":")[2]
        assert await is_serving(f"127.0.0.1:{port}")
        if server.address.startswith("[::]"):
            assert await is_serving(f"[::1]:{port}")


@pytest.mark.parametrize("command", ["serve", "doctor"])
async def test_image_asks_for_a_database(command: str, tmp_path: Path) -> None:
    """SQLite has to be named, because a container's file does not outlive it."""
    required: dict[str, Any] = {"ROSTER_DATABASE_REQUIRED": "true", "ROSTER_LISTEN": "127.0.0.1:0"}
    refused = await run(ROSTER, command, folder=tmp_path, **required, ROSTER_DATABASE_URL=" ")

    assert refused.status == (2 if command == "serve" else 1)
    assert "ROSTER_DATABASE_URL is not set; set it to postgresql://" in refused.out + refused.err
    async with serving(tmp_path, **required, ROSTER_DATABASE_URL="sqlite:///own.db") as server:
        assert await is_serving(server.address)


@pytest.mark.parametrize("variable", ["ROSTER_LISTEN", "ROSTER_HEALTH_LISTEN"])
async def test_only_our_error_is_printed_for_a_port_in_use(variable: str, tmp_path: Path) -> None:
    """Also if gRPC would log one of its own."""
    async with serving(tmp_path) as server:
        taken: dict[str, Any] = {
            "ROSTER_LISTEN": "127.0.0.1:0",
            "ROSTER_METRICS_LISTEN": "",
            variable: server.address,
        }
        second = await run(
            ROSTER, "serve", folder=tmp_path, ROSTER_LOG_LEVEL="ERROR", GRPC_VERBOSITY="error", **taken
        )

    _, error = second.err.splitlines()
    assert error.startswith(f"Error: can't listen on {server.address}; is another server listening there?")
    assert variable in error


async def test_new_database_has_no_revision_none(empty_postgresql_url: str, tmp_path: Path) -> None:
    """It has no schema; what `serve` and `doctor` say about it is what `migrate` then does."""
    refused = await serve(tmp_path, "", "0", ROSTER_DATABASE_URL=empty_postgresql_url)
    doctor = await run(ROSTER, "doctor", folder=tmp_path, ROSTER_DATABASE_URL=empty_postgresql_url)
    down = await run(
        ROSTER, "migrate", "--down", "base", folder=tmp_path, ROSTER_DATABASE_URL=empty_postgresql_url
    )

    migrated = await run(ROSTER, "migrate", folder=tmp_path, ROSTER_DATABASE_URL=empty_postgresql_url)

    assert down == Ended(0, "nothing to do: the database has no schema\n", "")
    promised = re.search(r"the database has no schema; .* create it at revision (\d+)$", refused.err.strip())
    assert promised
    assert migrated.out == f"schema created at revision {promised[1]}\n"
    assert f"create it at revision {promised[1]}\n" in doctor.out


async def test_sql_needs_no_database_that_can_be_reached(tmp_path: Path) -> None:
    """A URL with several hosts is one that SQLAlchemy can't parse."""
    printed = await run(
        ROSTER, "migrate", "--sql", folder=tmp_path, ROSTER_DATABASE_URL="postgresql://ada@a:1,b:2/roster"
    )

    assert (printed.status, printed.err) == (0, "")
    assert "CREATE TABLE users (" in printed.out
