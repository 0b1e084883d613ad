"""Texts of callers, servers and files: they forge no log line, and control no terminal."""

import csv
import io
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import select

from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceServicer, add_BulkServiceServicer_to_server
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest
from roster.v1.users_pb2_grpc import (
    UserServiceAsyncStub,
    UserServiceServicer,
    add_UserServiceServicer_to_server,
)
from service.escape import escape
from service.loads.model import Load
from service.loads.repository import LoadRepository
from service.loads.rules import PRINTABLE
from service.server import Server
from tests.e2e.clients import Grpcurl
from tests.e2e.hostile.support import victim
from tests.support.command import ROSTER, run
from tests.support.errors import refusal
from tests.support.log_lines import parse
from tests.support.raw_http2 import framed, http2

SECRET = b"s3cr3t-value"
GET_USER = "/roster.v1.UserService/GetUser"
FORGED = "x\n2026-01-01 00:00:00,000 INFO    roster.audit: forged"
# Clears the screen, sets the window's title, goes up a line, reverses the text, ends the line.
CONTROLS = "a\x1b[2J\x1b]0;owned\x07\x9b1A\u202eb\r\n\u2028\x7fc"
HEADERS = [
    (b"x-request-id", FORGED.encode()),
    (b"x-request-id", CONTROLS.encode()),
    (b"x-request-id", b"\xff\x9b2J"),
    (b"x-request-id", b"x" * 4000),
    (b"traceparent", b"00-a\nb-c-d"),
    (b"authorization", b"Bearer \xff" + SECRET),
    (b"authorization", b"Bearer \n" + SECRET),
    (b"authorization", b"Bearer e30." + SECRET + b".\x1b[2J"),
    (b"grpc-timeout", SECRET),
    (b"grpc-encoding", SECRET),
    (b"te", SECRET),
    (b"secret-bin", b"!" + SECRET),
    (b"secret\n", SECRET),
    (b"grpc-trace-bin", SECRET),
]
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +([\w.]+): (.*)")


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/roster.db"


@pytest.mark.parametrize("form", ["text", "json"])
async def test_stranger_can_not_forge_log_lines(tmp_path: Path, form: str) -> None:
    """With each header that strangers can damage, and the log at DEBUG; no value is logged."""
    async with victim(
        tmp_path, sqlite(tmp_path), reads_log=True, ROSTER_LOG_LEVEL="DEBUG", ROSTER_LOG_FORMAT=form
    ) as server:
        for header in HEADERS:
            async with http2(server.address, server.ca) as connection:
                stream = connection.open(GET_USER, header)
                await connection.send(stream, framed(b"\x08\x01"), end=True)
                await connection.status(stream)
        server.process.signal(signal.SIGTERM)
        log = (await server.process.ended()).err

    lines = [line for line in log.splitlines() if not line.startswith(("stopping", "  "))]
    assert log.replace("\n", "").isprintable()
    assert SECRET.decode() not in log
    assert "Invalid encoding on …" in log  # it was damaged enough to be logged
    if form == "text":
        assert all(LINE.fullmatch(line) for line in lines)
        assert "roster.audit" not in {found[1] for found in map(LINE.fullmatch, lines) if found}


async def test_request_id_is_kept_if_printable_ascii(tmp_path: Path) -> None:
    """Others are replaced, so that each can be searched for."""
    async with victim(
        tmp_path, sqlite(tmp_path), reads_log=True, ROSTER_LOG_LEVEL="INFO", ROSTER_LOG_FORMAT="text"
    ) as server:
        for sent in ("from the gateway", 'a"b=c', "é", "x" * 129):
            async with http2(server.address, server.ca) as connection:
                stream = connection.open(GET_USER, (b"x-request-id", sent.encode()))
                await connection.send(stream, framed(b""), end=True)
                await connection.status(stream)
        server.process.signal(signal.SIGTERM)
        log = (await server.process.ended()).err

    found = [LINE.fullmatch(line) for line in log.splitlines()]
    calls = [parse(line[2])[1] for line in found if line and line[1] == "service.calls"]
    ids = [call["request_id"] for call in calls]
    assert ids[:2] == ["from the gateway", 'a"b=c']
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids[2:])


@pytest.mark.parametrize(
    "load_id", ["a\nb", "a\x1b[2J", "a\u202eb", "\x7f", "a\u2028b", "a\u00a0b", "\ue000"]
)
async def test_load_name_must_be_printable(server: Server, users: UserServiceAsyncStub, load_id: str) -> None:
    """The error says which names are valid, and nothing is stored."""
    options = pb.BulkOptions(load_id=load_id)

    refused = await refusal(users.BulkCreateUsers(iter([BulkCreateUsersRequest(options=options)])).read())

    assert (refused.reason, refused.fields) == ("INVALID_FIELD", ["options.load_id"])
    assert "must have printable characters only" in refused.message
    async with server.database.read() as session:
        assert not (await session.scalars(select(Load))).all()


async def test_grpcurl_can_not_open_load_with_escapes(server: Server) -> None:
    """As typed in a shell."""
    grpcurl = Grpcurl(server.address)

    with pytest.raises(grpc.RpcError) as caught:
        await grpcurl.call("BulkCreateUsers", {"options": {"load_id": "a\x1b[2J\nb"}})

    assert caught.value.details() == f"options.load_id {PRINTABLE}"


async def test_older_load_with_escapes_is_listed_resumed_and_aborted(
    server: Server, users: UserServiceAsyncStub
) -> None:
    """Loads of earlier releases remain usable, and are printed escaped."""
    options = pb.BulkOptions(load_id=CONTROLS)
    async with server.database.begin() as session:
        load = LoadRepository(session, "anonymous")
        await load.open(CONTROLS, "roster.v1.UserService.BulkCreateUsers", options.SerializeToString())

    listed = await run(ROSTER, "loads", ROSTER_ADDRESS=server.address)
    resumed = users.BulkCreateUsers(iter([BulkCreateUsersRequest(options=options)]))
    opened = await resumed.read()
    aborted = await run(ROSTER, "loads", "abort", CONTROLS, "--yes", ROSTER_ADDRESS=server.address)

    assert isinstance(opened, pb.BulkWriteResponse)
    assert opened.opened.load_id == CONTROLS
    assert listed.out.splitlines()[1].endswith(escape(CONTROLS))
    assert aborted.status == 0
    assert all(map(is_harmless, (listed.out, listed.err, aborted.out, aborted.err)))


def is_harmless(output: str) -> bool:
    """Return whether an output has only printable lines."""
    return output.replace("\n", "").isprintable()


# ruff: noqa: ARG002 - methods of servicers
class Rogue(BulkServiceServicer):
    """A server whose responses and errors contain terminal escapes."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails

    async def ListBulkLoads(self, request: Any, context: Any) -> pb.ListBulkLoadsResponse:  # noqa: N802
        if self._fails:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"[bold red]{CONTROLS}")
        return pb.ListBulkLoadsResponse(loads=[self.load()])

    async def GetBulkLoad(self, request: Any, context: Any) -> pb.BulkLoad:  # noqa: N802
        return self.load()

    async def ListBulkLoadFailures(self, request: Any, context: Any) -> Any:  # noqa: N802
        failure = pb.RowFailure(offset=1, reason=CONTROLS, field=CONTROLS, message=CONTROLS)
        return pb.ListBulkLoadFailuresResponse(failures=[failure])

    @staticmethod
    def load() -> pb.BulkLoad:
        options = pb.BulkOptions(load_id=CONTROLS)
        return pb.BulkLoad(load_id=CONTROLS, method=f"x.{CONTROLS}", state=pb.BulkLoad.OPEN, options=options)


class RogueUsers(UserServiceServicer):
    """A server that rejects each row with such a text."""

    async def BulkCreateUsers(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        first = await anext(request_iterator)
        opened = pb.BulkOpened(load_id=first.options.load_id, max_rows=100, max_bytes=1 << 20)
        yield pb.BulkWriteResponse(opened=opened)
        async for message in request_iterator:
            if size := len(message.users):
                failures = [
                    pb.RowFailure(offset=n, reason=CONTROLS, field=CONTROLS, message=CONTROLS)
                    for n in range(size)
                ]
                yield pb.BulkWriteResponse(ack=pb.BulkAck(next_offset=size, failed=size, failures=failures))
            if message.finish:
                yield pb.BulkWriteResponse(
                    summary=pb.BulkSummary(failed=2, next_offset=2, state=pb.BulkLoad.FINISHED)
                )
                return


@asynccontextmanager
async def rogue(*, fails: bool = False) -> AsyncIterator[str]:
    """Run such a server, and yield its address."""
    server = grpc.aio.server()
    add_BulkServiceServicer_to_server(Rogue(fails=fails), server)  # type: ignore[abstract]
    add_UserServiceServicer_to_server(RogueUsers(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["show", "x"], ["show", "x", "--json"]])
async def test_responses_can_not_control_the_terminal(words: list[str]) -> None:
    """Each value stays on its line; JSON stays the same document."""
    async with rogue() as address:
        ended = await run(ROSTER, "loads", *words, ROSTER_ADDRESS=address)

    assert (ended.status, is_harmless(ended.out)) == (0, True)
    if "--json" in words:
        assert json.loads(ended.out.splitlines()[0])["load_id"] == CONTROLS
    elif words == ["list"]:
        assert len(ended.out.splitlines()) == 2


async def test_errors_can_not_control_the_terminal() -> None:
    """One line, none of which is markup."""
    async with rogue(fails=True) as address:
        ended = await run(ROSTER, "loads", ROSTER_ADDRESS=address)

    assert (ended.status, ended.out) == (2, "")
    assert ended.err == f"Error: [bold red]{escape(CONTROLS)}\n"


@pytest.mark.parametrize("suffix", ["ndjson", "csv"])
async def test_rejects_have_one_escaped_line_per_row(tmp_path: Path, suffix: str) -> None:
    """With the server's reason, escaped; so is the printed summary."""
    row = {"email": "=1+1@example.org", "full_name": CONTROLS.replace("\r\n", "")}
    lines = [json.dumps(row)] * 2
    if suffix == "csv":
        lines = ["email,full_name", *[",".join(row.values())] * 2]
    (tmp_path / f"in.{suffix}").write_text("".join(f"{line}\n" for line in lines), newline="")
    async with rogue() as address:
        ended = await run(
            ROSTER, "load", "users", f"in.{suffix}", "--load-id", "a", folder=tmp_path, ROSTER_ADDRESS=address
        )

    rejects = (tmp_path / f"in.rejects.{suffix}").read_bytes().decode().removesuffix("\n").split("\n")
    assert (ended.status, is_harmless(ended.out), is_harmless(ended.err)) == (1, True, True)
    if suffix == "csv":
        head, *rows = csv.reader(rejects)
        assert head == ["_error", "email", "full_name"]
        assert [found[1:] for found in rows] == [list(row.values())] * 2
        assert all(is_harmless(found[0]) for found in rows)
    else:
        assert all(map(is_harmless, rejects))
        assert [json.loads(line) | {"_error": None} for line in rejects] == [row | {"_error": None}] * 2
        assert json.loads(rejects[0])["_error"]["message"] == CONTROLS


@pytest.mark.parametrize("name", ["a\x1b[2J\nb.csv", "a\udcff.csv", "a\u202e.csv"])
async def test_file_names_and_columns_can_not_control_the_terminal(tmp_path: Path, name: str) -> None:
    """Files come from others, and their names from a pattern of the shell."""
    (tmp_path / name).write_text(f"email,\x1b[2J{CONTROLS[:8]}\nnobody\n")
    async with rogue() as address:
        command = ["load", "users", name, "--load-id", "a"]
        loaded = await run(ROSTER, *command, folder=tmp_path, ROSTER_ADDRESS=address)
        summary = await run(ROSTER, *command, "--json", folder=tmp_path, ROSTER_ADDRESS=address)
    missing = await run(ROSTER, "load", "users", f"{name}.missing", folder=tmp_path)
    unknown = await run(ROSTER, "load", "users", f"{name}.\x1b", folder=tmp_path)

    assert (loaded.status, missing.status, unknown.status) == (1, 2, 2)
    assert json.loads(summary.out)["file"] == name
    for ended in (loaded, summary, missing, unknown):
        assert is_harmless(ended.out)
        assert is_harmless(ended.err)


async def test_export_is_escaped_only_on_a_terminal(server: Server, users: UserServiceAsyncStub) -> None:
    """Users choose their full names."""
    await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org", full_name=CONTROLS)))
    script = f"{ROSTER} export users --format csv --address {server.address}"

    shown = await run("script", "--quiet", "--return", "--command", script, "/dev/null")
    piped = await run(ROSTER, "export", "users", "--format", "csv", ROSTER_ADDRESS=server.address)

    assert escape("\x1b[2J") in shown.out
    assert "\x1b]0;" not in shown.out
    assert next(csv.reader(io.StringIO(piped.out, newline="").readlines()[1:]))[2] == CONTROLS
