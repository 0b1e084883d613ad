"""The log of a real server: one line for each call, with its ids and without its content."""

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
from grpc_reflection.v1alpha import reflection_pb2

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service import logs
from service.server import Server
from tests.support.command import serving
from tests.support.errors import refusal
from tests.support.server import serve

SECRET = "ada-lovelace@example.org"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
IDS = [("x-request-id", "from the gateway"), ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")]
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class CapturedLog:
    """Captures the log in one of its formats."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.handler = logging.StreamHandler(io.StringIO())
        self.handler.setFormatter(formatter)

    @property
    def text(self) -> str:
        """Return the whole log."""
        return str(self.handler.stream.getvalue())

    async def calls(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait for this many lines of calls, and return them; a failed call is logged after its status."""
        while len(found := self._calls()) < count:
            await asyncio.to_thread(self.handler.flush)
        return found

    def _calls(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["logger"] == "service.calls"]


@pytest.fixture
def form() -> logging.Formatter:
    """The format of the log."""
    return logs.Json()


@pytest.fixture
def written(form: logging.Formatter) -> Iterator[CapturedLog]:
    """The log of the test, from DEBUG on."""
    written, ours = CapturedLog(form), logging.getLogger("service")
    level = ours.level
    ours.setLevel(logging.DEBUG)
    ours.addHandler(written.handler)
    yield written
    ours.removeHandler(written.handler)
    ours.setLevel(level)


async def test_call_is_one_line(server: Server, written: CapturedLog, users: UserServiceAsyncStub) -> None:
    """It has caller, method, code, duration and statements."""
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


async def test_stream_is_one_line(written: CapturedLog, users: UserServiceAsyncStub) -> None:
    """It has the statements of all batches."""
    messages = [BulkCreateUsersRequest(users=[User(email=f"{n}{SECRET}")]) for n in range(3)]
    async for _ in users.BulkCreateUsers(iter(messages)):
        pass

    (line,) = await written.calls()
    assert line["statements"] >= len(messages)


@on_sqlite
async def test_lines_have_no_content_of_calls(written: CapturedLog, users: UserServiceAsyncStub) -> None:
    """Whether the call succeeds or fails, even at the most verbose level."""
    await users.CreateUser(CreateUserRequest(user=User(email=SECRET)))
    await refusal(users.CreateUser(CreateUserRequest(user=User(email=SECRET, password="x"))))
    await refusal(users.GetUser(GetUserRequest(email=f"not {SECRET}")))

    calls = await written.calls(3)
    assert [line["code"] for line in calls] == ["OK", "ALREADY_EXISTS", "INVALID_ARGUMENT"]
    assert SECRET not in written.text


@on_sqlite
async def test_call_without_request_id_gets_one(written: CapturedLog, users: UserServiceAsyncStub) -> None:
    """It differs for each call; no trace id is made up."""
    for _ in range(2):
        await refusal(users.GetUser(GetUserRequest(id=99)))

    first, second = await written.calls(2)
    assert first["request_id"] != second["request_id"]
    assert "trace_id" not in first


@on_sqlite
async def test_lines_during_a_call_have_its_ids(
    written: CapturedLog, server: Server, users: UserServiceAsyncStub
) -> None:
    """The caller's id finds what went wrong in the server."""
    server.database.rows = None  # type: ignore[method-assign, assignment]
    await refusal(users.GetUser(GetUserRequest(id=1), metadata=IDS))

    await written.calls()
    (failure,) = [line for line in map(json.loads, written.text.splitlines()) if line["level"] == "ERROR"]
    assert (failure["request_id"], failure["trace_id"]) == ("from the gateway", TRACE_ID)
    assert "TypeError" in failure["exception"]


@on_sqlite
async def test_probes_are_logged_at_debug(written: CapturedLog, channel: grpc.aio.Channel) -> None:
    """They come every few seconds."""
    await HealthStub(channel).Check(HealthCheckRequest())

    (line,) = await written.calls()
    assert line["level"] == "DEBUG"


@on_sqlite
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_is_logged_at_debug(
    version: str, written: CapturedLog, channel: grpc.aio.Channel
) -> None:
    """Tools such as grpcurl ask before each call; other calls are still logged at INFO."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stream: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
    )
    async for _ in stream(iter([request])):
        pass
    await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))

    reflection, call = await written.calls(2)
    assert (reflection["level"], call["level"]) == ("DEBUG", "INFO")
    assert "reflection" in reflection["method"]


class TestSlowCalls:
    """A server for which every call is slow."""

    @pytest.fixture
    async def server(self, sqlite_url: str) -> AsyncIterator[Server]:
        """A server of the test's own."""
        async with serve(sqlite_url, slow_call=1e-9) as server:
            yield server

    async def test_slow_call_is_a_warning(self, written: CapturedLog, users: UserServiceAsyncStub) -> None:
        """It has the number of statements."""
        await users.CreateUser(CreateUserRequest(user=User(email=SECRET)))

        (line,) = await written.calls()
        assert (line["level"], line["statements"]) == ("WARNING", 2)  # the first is SQLite's BEGIN

    async def test_stream_is_never_slow(self, written: CapturedLog, users: UserServiceAsyncStub) -> None:
        """Its client decides how long it lasts."""
        async for _ in users.BulkCreateUsers(iter([BulkCreateUsersRequest(finish=True)])):
            pass

        (line,) = await written.calls()
        assert line["level"] == "INFO"


@pytest.mark.parametrize("form", [logs.Text("%(levelname)s %(name)s: %(message)s")])
@on_sqlite
async def test_terminal_gets_readable_lines(written: CapturedLog, users: UserServiceAsyncStub) -> None:
    """The fields follow the message; a value with spaces is quoted."""
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
async def test_command_uses_the_configured_format(
    tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    """The default is JSON, and text on a terminal."""
    async with serving(tmp_path, **settings) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))
        await process.said(expected)
