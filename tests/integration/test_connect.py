"""Connections with libpq's parameters, to a real PostgreSQL and to servers that fail."""

import asyncio
import os
import pwd
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import URL, make_url

from service.db import conninfo
from service.db.connect import _candidates, connect
from service.db.engine import Database
from service.db.errors import NoUsableHost, cause_of
from service.settings import Settings
from tests.support.command import ROSTER, SERVER_DEFAULTS, run
from tests.support.fake_postgres import close, fake_postgres, hang, refuse
from tests.support.postgres import Postgres

NAMES = ("application_name", "search_path", "work_mem", "geqo", "statement_timeout")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Clear the variables of libpq."""
    for name in os.environ:
        if name.startswith("PG"):
            monkeypatch.delenv(name)
    return monkeypatch


def read(text: str) -> dict[str, str]:
    """Return the parameters of a connection string, with those of the environment."""
    return conninfo.read(text, os.environ)


@pytest.fixture
def url(postgresql_url: str) -> URL:
    """A migrated database, over TCP."""
    return make_url(postgresql_url)


@asynccontextmanager
async def connected(text: str, timeout: float | None = 10) -> AsyncIterator[Any]:
    """Connect with a connection string alone."""
    parameters = read(text)
    connection = await connect(parameters, timeout=timeout)
    try:
        yield connection
    finally:
        await connection.close()


def hosts(url: URL, *places: str, **parameters: str) -> str:
    """Return a connection string with these hosts."""
    query = "&".join(f"{name}={quote(value)}" for name, value in parameters.items())
    return f"postgresql://{url.username}@{','.join(places)}/{url.database}?{query}"


def place(url: URL) -> str:
    return f"{url.host}:{url.port}"


async def settings_of(text: str) -> dict[str, str]:
    """Return settings of a session of the service."""
    database = Database(Settings(database_url=text))
    try:
        async with database.read() as session:
            connection = await session.connection()
            shown = {name: (await connection.exec_driver_sql(f"SHOW {name}")).scalar_one() for name in NAMES}
            activity = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            assert (await connection.exec_driver_sql(activity)).scalar_one() == shown["application_name"]
            return shown
    finally:
        await database.close()


async def test_parameters_reach_the_session(url: URL) -> None:
    """The application name replaces that of Roster; the settings that Roster needs override `options`."""
    options = "-csearch_path=app,public --work-mem=7MB -c geqo=off -c statement_timeout=1"
    shown = await settings_of(hosts(url, place(url), application_name="bill ing", options=options))

    assert shown == {
        "application_name": "bill ing",
        "search_path": "app,public",
        "work_mem": "7MB",
        "geqo": "off",
        "statement_timeout": "30s",
    }


async def test_schema_of_prisma_is_the_search_path(url: URL) -> None:
    """A name that has to be quoted is quoted."""
    assert (await settings_of(hosts(url, place(url), schema="my-app")))["search_path"] == '"my-app"'


async def test_application_name_has_a_default(url: URL) -> None:
    """By which `roster migrate --contract` finds servers."""
    assert (await settings_of(hosts(url, place(url))))["application_name"].startswith("roster 0")


@pytest.mark.parametrize("form", ["host", "query", "keywords"])
async def test_connects_through_a_socket(form: str, url: URL, postgres: Postgres) -> None:
    """Cloud SQL and Debian name a folder, in one of three ways."""
    async with connected(hosts(url, place(url))) as connection:
        folder = (await connection.fetchval("SHOW unix_socket_directories")).partition(",")[0]
    if not folder:
        pytest.skip("this PostgreSQL has no socket")
    text = {
        "host": f"postgresql://{url.username}@{quote(folder, safe='')}:{url.port}/{url.database}",
        "query": f"postgresql://{url.username}@/{url.database}?host={folder}&port={url.port}",
        "keywords": f"host='{folder}' port={url.port} user={url.username} dbname={url.database}",
    }[form]
    database = Database(Settings(database_url=text))
    await database.ping()
    await database.close()
    async with connected(text) as connection:
        assert await connection.fetchval("SELECT inet_server_addr()") is None


async def test_connects_to_the_first_host_that_answers(url: URL) -> None:
    """The others refuse, hang, close the connection, don't exist, or are starting up."""
    starting = refuse("57P03", "the database system is starting up")
    async with (
        fake_postgres(hang) as hanging,
        fake_postgres(close) as closing,
        fake_postgres(starting) as late,
    ):
        dead = ["127.0.0.1:1", f"127.0.0.1:{hanging}", f"127.0.0.1:{closing}", f"127.0.0.1:{late}"]
        text = hosts(url, *dead, "nowhere.invalid", place(url), connect_timeout="1")
        database = Database(Settings(database_url=text))
        await database.ping()
        await database.close()


async def test_silent_host_does_not_delay_the_next_one(url: URL) -> None:
    """It may have ten minutes to answer."""
    async with fake_postgres(hang) as hanging:
        text = hosts(url, f"127.0.0.1:{hanging}", place(url), connect_timeout="600")
        async with asyncio.timeout(20), connected(text) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_error_names_each_host(url: URL, postgres: Postgres) -> None:
    """If none can be used; each has a short cause of its own."""
    starting = refuse("57P03", "the database system is starting up")
    async with fake_postgres(hang) as hanging, fake_postgres(starting) as late:
        places = [
            *("nowhere.invalid", "127.0.0.1:1", "localhost:1", "[::1]:1", "%2Fnowhere:7"),
            *(f"127.0.0.1:{hanging}", f"127.0.0.1:{late}", place(url)),
        ]
        text = hosts(url, *places, target_session_attrs="standby")
        with pytest.raises(NoUsableHost) as caught:
            await connect(read(text), timeout=0.5)

    unknown, *others = str(caught.value).split("; ")
    assert unknown.startswith("nowhere.invalid:5432: ")
    assert others == [
        "127.0.0.1:1: connection refused",
        "localhost:1: connection refused",
        "[::1]:1: connection refused",
        "/nowhere/.s.PGSQL.7: no such file or directory",
        f"127.0.0.1:{hanging}: no answer in time",
        f"127.0.0.1:{late}: the database system is starting up",
        f"{place(url)}: the server is not standby",
    ]
    assert cause_of(caught.value) == str(caught.value)
    assert caught.value.was_reached


@pytest.mark.parametrize("wanted", ["any", "prefer-standby"])
async def test_error_names_a_host_once(wanted: str, url: URL) -> None:
    """Although `prefer-standby` tries each twice; the only host is named, too."""
    text = hosts(url, "127.0.0.1:1", target_session_attrs=wanted)
    with pytest.raises(NoUsableHost, match=r"^127\.0\.0\.1:1: connection refused$") as caught:
        await connect(read(text), timeout=5)

    assert not caught.value.was_reached


@pytest.mark.parametrize(
    ("wanted", "expected"), [("standby", "the server is not standby"), ("read-only", "is not read-only")]
)
@pytest.mark.parametrize("dead", [[], ["127.0.0.1:1"]])
async def test_commands_name_the_host_that_does_not_fit(
    wanted: str, expected: str, dead: list[str], url: URL, tmp_path: Path
) -> None:
    """It was reached; the names of the driver's classes stay out."""
    text = hosts(url, *dead, place(url), target_session_attrs=wanted)
    variables: dict[str, Any] = {"ROSTER_DATABASE_URL": text, "ROSTER_DATABASE_WAIT": "0"} | SERVER_DEFAULTS
    for command in ("doctor", "serve"):
        done = await run(ROSTER, command, folder=tmp_path, **variables)
        (line,) = (
            line for line in (done.out + done.err).splitlines() if "the database can't be used" in line
        )

        assert line.endswith(f"{place(url)}: the server is not {wanted}; check ROSTER_DATABASE_URL")
        assert ("127.0.0.1:1: connection refused; " in line) == bool(dead)
        assert "<" not in line
        assert expected in line


async def test_missing_database_was_reached(url: URL, tmp_path: Path) -> None:
    """The server itself says so."""
    text = hosts(url.set(database="rosterr"), "127.0.0.1:1", place(url))
    variables: dict[str, Any] = {"ROSTER_DATABASE_URL": text} | SERVER_DEFAULTS
    done = await run(ROSTER, "doctor", folder=tmp_path, **variables)

    assert done.out.splitlines()[-1] == (
        'FAIL  database  the database refused the connection: database "rosterr" does not exist; create the '
        "database first, as with `createdb`; check ROSTER_DATABASE_URL"
    )


async def test_refused_login_ends_the_search(url: URL) -> None:
    """A wrong password on one host is not tried on the next, as libpq does it."""
    async with fake_postgres(refuse("28P01", "password authentication failed")) as strict:
        text = hosts(url, f"127.0.0.1:{strict}", place(url))
        with pytest.raises(Exception, match="password authentication failed"):
            await connect(read(text), timeout=5)


@pytest.mark.parametrize(
    ("wanted", "is_found"),
    [("any", True), ("primary", True), ("read-write", True), ("prefer-standby", True), ("standby", False)],
)
async def test_session_attributes_select_a_host(wanted: str, is_found: bool, url: URL) -> None:
    """There is only a primary; `prefer-standby` takes it."""
    text = hosts(url, "127.0.0.1:1", place(url), target_session_attrs=wanted)
    if is_found:
        async with connected(text) as connection:
            assert await connection.fetchval("SELECT pg_is_in_recovery()") is False
        return
    with pytest.raises(ConnectionError, match="the server is not standby"):
        await connect(read(text), timeout=5)


async def test_read_only_host_is_passed_over(url: URL, postgres: Postgres) -> None:
    """Nothing can be written there; after a failover it may be another one."""
    async with postgres.database() as other:
        name = make_url(other).database
        async with connected(hosts(url, place(url))) as connection:
            await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        text = hosts(url.set(database=name), place(url), target_session_attrs="read-write")
        with pytest.raises(ConnectionError, match="the server is not read-write"):
            await connect(read(text), timeout=5)


async def test_connect_timeout_ends_a_connection_that_hangs(url: URL) -> None:
    """It overrides ROSTER_CONNECT_TIMEOUT."""
    async with fake_postgres(hang) as port:
        text = hosts(url, f"127.0.0.1:{port}", connect_timeout="1")
        database = Database(Settings(database_url=text, connect_timeout=600))
        with pytest.raises(Exception, match="can't be reached"):
            await database.ping()
        await database.close()


@pytest.mark.parametrize("value", ["0", "-1"])
async def test_connect_timeout_of_zero_is_no_limit(value: str, url: URL) -> None:
    """As for libpq: the connection is still being opened when the default would have ended it."""
    asked = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    async with fake_postgres(converse) as port:
        text = hosts(url, f"127.0.0.1:{port}", connect_timeout=value)
        database = Database(Settings(database_url=text, connect_timeout=0.001))
        ping = asyncio.create_task(database.ping())
        await asked.wait()
        done, _ = await asyncio.wait([ping], timeout=0.1)
        assert not done
        ping.cancel()
        await asyncio.wait([ping])
        await database.close()


async def test_keepalives_are_those_of_the_url(url: URL) -> None:
    """The kernel reports them; without parameters nothing is changed."""
    values = {"keepalives_idle": "33", "keepalives_interval": "7", "keepalives_count": "4"}
    async with connected(hosts(url, place(url), tcp_user_timeout="9000", **values)) as connection:
        own = connection._transport.get_extra_info("socket")
        with socket.socket(fileno=socket.dup(own.fileno())) as tcp:
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            assert [tcp.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [33, 7, 4, 9000]


async def test_random_order_reaches_every_host(url: URL) -> None:
    """Each connection starts at another one."""
    text = hosts(url, "a", "b", "c", place(url), load_balance_hosts="random")
    parameters = read(text)
    first = {next(_candidates(parameters))[0][0] for _ in range(200)}
    assert first == {"a", "b", "c", url.host}


async def test_service_is_read_from_its_file(
    url: URL, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver itself would ignore a service that it does not find, and connect elsewhere."""
    service = f"[main]\nhost=127.0.0.1\nport={url.port}\nuser={url.username}\napplication_name=service\n"
    (tmp_path / "services").write_text(service)
    environment.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    text = f"postgresql:///{url.database}?service=main"

    assert (await settings_of(text))["application_name"] == "service"


async def test_user_defaults_to_that_of_the_process(url: URL) -> None:
    """As for libpq, whose message says so."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    with pytest.raises(Exception, match=f'role "{user}" does not exist'):
        await connect(read(f"postgresql://{place(url)}/{url.database}"), timeout=5)
