"""The log of a real server: a line a call, what it belongs to, and nothing that was in it."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service import logs
from service.server import Server
from tests.support.command import serving
from tests.support.errors import refusal
from tests.support.server import serve

SECRET = "ada-lovelace@example.org"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
IDS = [("x-request-id", "from the gateway"), ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")]
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Written:
    """What is written to the log, in one of its forms."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.handler = logging.StreamHandler(io.StringIO())
        self.handler.setFormatter(formatter)

    @property
    def text(self) -> str:
        """All of it."""
        return str(self.handler.stream.getvalue())

    async def calls(self, count: int = 1) -> list[dict[str, Any]]:
        """Return the lines of calls, once there are so many: a refused one's comes behind its answer."""
        while len(found := self._calls()) < count:
            await asyncio.to_thread(self.handler.flush)
        return found

    def _calls(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["logger"] == "service.calls"]


@pytest.fixture
def form() -> logging.Formatter:
    """How the log is written."""
    return logs.Json()


@pytest.fixture
def written(form: logging.Formatter) -> Iterator[Written]:
    """The log of the test, from DEBUG on."""
    written, ours = Written(form), logging.getLogger("service")
    level = ours.level
    ours.setLevel(logging.DEBUG)
    ours.addHandler(written.handler)
    yield written
    ours.removeHandler(written.handler)
    ours.setLevel(level)


async def test_a_call_is_a_line(server: Server, written: Written, users: UserServiceStub) -> None:
    """Who called what, how it ended, how long it took, and what it asked of the database."""
    await users.CreateUser(CreateUserRequest(user=User(email=SECRET)), metadata=IDS)

    (line,) = await written.calls()
    assert line.pop("seconds") >= line.pop("statement_seconds") > 0
    assert line.pop("peer").startswith("ipv4:127.0.0.1:")
    assert line.pop("time").endswith("+00:00")
    assert line.pop("statements") == 1 + server.database.is_sqlite  # its BEGIN is one
    assert line == {
        "level": "INFO",
        "logger": "service.calls",
        "message": "call",
        "request_id": "from the gateway",
        "trace_id": TRACE_ID,
        "method": "/roster.v1.UserService/CreateUser",
        "code": "OK",
        "caller": "anonymous",
    }


async def test_a_stream_is_a_line(written: Written, users: UserServiceStub) -> None:
    """With the statements of all its batches."""
    messages = [BulkCreateUsersRequest(users=[User(email=f"{n}{SECRET}")]) for n in range(3)]
    async for _ in users.BulkCreateUsers(iter(messages)):
        pass

    (line,) = await written.calls()
    assert line["statements"] >= len(messages)


@on_sqlite
async def test_no_line_has_what_was_in_a_call(written: Written, users: UserServiceStub) -> None:
    """Neither of one that is fine nor of one that is refused, nor at the most talkative level."""
    await users.CreateUser(CreateUserRequest(user=User(email=SECRET)))
    await refusal(users.CreateUser(CreateUserRequest(user=User(email=SECRET, password="x"))))
    await refusal(users.GetUser(GetUserRequest(email=f"not {SECRET}")))

    calls = await written.calls(3)
    assert [line["code"] for line in calls] == ["OK", "ALREADY_EXISTS", "INVALID_ARGUMENT"]
    assert SECRET not in written.text


@on_sqlite
async def test_a_call_without_ids_gets_one(written: Written, users: UserServiceStub) -> None:
    """Another one each time; a trace is not made up."""
    for _ in range(2):
        await refusal(users.GetUser(GetUserRequest(id=99)))

    first, second = await written.calls(2)
    assert first["request_id"] != second["request_id"]
    assert "trace_id" not in first


@on_sqlite
async def test_lines_of_a_call_carry_its_ids(
    written: Written, server: Server, users: UserServiceStub
) -> None:
    """What went wrong inside is found by the id that the caller knows."""
    server.database.read = None  # type: ignore[method-assign, assignment]
    await refusal(users.GetUser(GetUserRequest(id=1), metadata=IDS))

    await written.calls()
    (failure,) = [line for line in map(json.loads, written.text.splitlines()) if line["level"] == "ERROR"]
    assert (failure["request_id"], failure["trace_id"]) == ("from the gateway", TRACE_ID)
    assert "TypeError" in failure["exception"]


@on_sqlite
async def test_probes_are_quiet(written: Written, channel: grpc.aio.Channel) -> None:
    """They come every few seconds, and tell nothing."""
    await HealthStub(channel).Check(HealthCheckRequest())

    (line,) = await written.calls()
    assert line["level"] == "DEBUG"


class TestSlowCalls:
    """A server to which every call is slow."""

    @pytest.fixture
    async def server(self, sqlite_url: str) -> AsyncIterator[Server]:
        """A server of the test's own."""
        async with serve(sqlite_url, slow_call=1e-9) as server:
            yield server

    async def test_a_slow_call_is_a_warning(self, written: Written, users: UserServiceStub) -> None:
        """With the number of its statements, the first thing to look at."""
        await users.CreateUser(CreateUserRequest(user=User(email=SECRET)))

        (line,) = await written.calls()
        assert (line["level"], line["statements"]) == ("WARNING", 2)  # the first is SQLite's BEGIN

    async def test_a_stream_is_never_slow(self, written: Written, users: UserServiceStub) -> None:
        """It lasts as long as its client wants."""
        async for _ in users.BulkCreateUsers(iter([BulkCreateUsersRequest(finish=True)])):
            pass

        (line,) = await written.calls()
        assert line["level"] == "INFO"


@pytest.mark.parametrize("form", [logs.Text("%(levelname)s %(name)s: %(message)s")])
@on_sqlite
async def test_a_terminal_gets_lines_to_read(written: Written, users: UserServiceStub) -> None:
    """The same fields, after the message; a value with spaces is quoted."""
    await users.CreateUser(CreateUserRequest(user=User(email=SECRET)), metadata=IDS)

    assert written.text.startswith(
        f'INFO service.calls: call request_id="from the gateway" trace_id={TRACE_ID} '
        "method=/roster.v1.UserService/CreateUser code=OK seconds="
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, '"method":"/roster.v1'), ({"ROSTER_LOG_FORMAT": "text"}, " method=/roster.v1")],
    ids=["where nobody watches", "as text"],
)
async def test_the_command_logs_in_the_form_that_is_set(
    tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    """JSON, unless standard error is a terminal or the setting has it otherwise."""
    async with serving(tmp_path, **settings) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))
        await process.said(expected)
