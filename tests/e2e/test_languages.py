"""The clients in Go and TypeScript: their examples against a real server, and against what is not one."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from sqlalchemy import select

from roster.client.address import check_address
from roster.errors import DatabaseUnavailable, OutcomeUnknown
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkSummary, BulkWriteResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest
from service.db.bulk.batch import Outcome
from service.loads.model import Load
from service.loads.repository import LoadRepository
from service.server import Server
from service.status import status_from_error
from tests.e2e.clients import installed
from tests.support.authority import Authority
from tests.support.command import ended, run, start
from tests.support.cutting_proxy import cutting_proxy
from tests.support.languages import GO, NEEDS_GO, TYPESCRIPT, build_go, install_packages, node
from tests.support.rows import add_users, read_emails
from tests.support.server import serve

ROWS = 30_000  # six messages
IN_WINDOW = 25_000  # more than the client sends before the first ack
EMAILS = [f"user{number}@example.org" for number in range(ROWS)]
LINES = [f"{email}\n".encode() for email in EMAILS]
SETTLED = [f"{number} rows are settled" for number in range(5_000, ROWS + 1, 5_000)]
MIDDLE = 9  # of the chunks of 64 KiB
LOADED = [*SETTLED, f"{ROWS} created, 0 failed"]
ADDRESSES = [
    "127.0.0.1:50051",
    " roster.example.org:443\n",
    ":50051",
    "[::1]:50051",
    "dns:roster:50051",
    "dns:///roster:50051",
    "dns://8.8.8.8/roster.example.org:50051",
    "unix:/run/roster.sock",
    "unix:///run/roster.sock",
    "",
    "http://127.0.0.1:50051",
    "HTTP://Roster/",
    "https://roster.example.org",
    "https://[::1]:8443/x?y#z",
    "grpcs://roster:50051",
    "http://roster:80",
    "127.0.0.1:50051/",
    "roster:50051/roster.v1.UserService",
    "dns:///roster",
    "localhost",
    "localhost:",
    "[::1]",
    "::1:50051",
    "roster:0",
    "roster:65536",
    "roster:grpc",
    "/run/roster.sock",
    "./roster.sock",
    "a:50051,b:50051",
    "my server:50051",
    "postgresql://roster:secret@db:5432/roster",
]
PROBES = Path(__file__).with_name("probes")


class Programs:
    """The examples in one language, and the program that prints errors."""

    def __init__(self, folder: Path, language: str) -> None:
        self._language = language
        if language == "typescript":
            self._node = node()
            install_packages(folder)
            (folder / "probe.mjs").write_text((PROBES / "probe.mjs").read_text())
            self._folders = {"probe": folder}
        else:
            self._folder = build_go(folder / "programs", "./examples/...")
            build_go(self._folder, PROBES / "probe.go")

    def command(self, name: str, *arguments: str | Path) -> tuple[str | Path, ...]:
        """Return the command that runs a program."""
        if self._language == "go":
            return (self._folder / name, *arguments)
        examples = TYPESCRIPT / "examples/dist"
        program = self._folders[name] / f"{name}.mjs" if name in self._folders else examples / f"{name}.js"
        return (self._node, program, *arguments)


@pytest.fixture(scope="module", params=["typescript", pytest.param("go", marks=NEEDS_GO)])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The programs of the client, once for each language."""
    return Programs(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the clients are independent of it."""
    return sqlite_url


async def read_streams(server: Server) -> int | None:
    """Return how many streams the only load has had."""
    async with server.database.read() as session:
        return await session.scalar(select(Load.epoch))


async def test_calls(programs: Programs, server: Server) -> None:
    """A write whose answer was lost is repeated with its request_id, and applied once."""
    lost = iter([True])
    async with cutting_proxy(
        server.address, lambda data: b"Ada King" in data and next(lost, False), answers=True
    ) as proxy:
        done = await run(*programs.command("calls", proxy.address))
    again = await run(*programs.command("calls", server.address))

    assert (done.err, done.status) == (again.err, again.status) == ("", 0)
    assert done.out.splitlines() == [
        "user 1, version 1",
        "user 1 has this e-mail",
        "Ada King, version 2",
        "ada@example.org",
    ]
    assert again.out.splitlines()[:2] == ["user 1, version 2", "user 1 has this e-mail"]
    assert proxy.times == 1


@pytest.mark.parametrize("arguments", [(), ("http://127.0.0.1:50051", "staff")], ids=["missing", "wrong"])
@pytest.mark.parametrize("name", ["calls", "load", "feed"])
async def test_examples_report_errors_in_one_line(
    programs: Programs, name: str, arguments: tuple[str, ...]
) -> None:
    """Without the stack of an uncaught error."""
    given = arguments[:1] if name == "calls" else arguments

    done = await run(*programs.command(name, *given))

    assert done.err.count("\n") == done.status == 1
    assert ("write 127.0.0.1:50051" if arguments else f"usage: {name}") in done.err


async def test_pages_are_followed(programs: Programs, server: Server) -> None:
    """The rows of all pages arrive, in order."""
    ids = await add_users(server.database, 5)

    done = await run(*programs.command("probe", "pages", server.address))

    assert (done.out.split(), done.status) == ([str(id) for id in ids], 0)


async def test_errors_have_reason_facts_and_violations(programs: Programs, server: Server) -> None:
    """Callers see them without decoding details."""
    await add_users(server.database)

    done = await run(*programs.command("probe", "errors", server.address))

    assert done.out.splitlines() == [
        "EMAIL_TAKEN existing_id=1",
        "INVALID_FIELD user.email",
        "USER_NOT_FOUND",
    ]


async def test_load_survives_a_restart(programs: Programs, database_url: str) -> None:
    """Each row is written once, and each message has one ack; the finished load sends nothing."""
    async with serve(database_url) as server:
        load = await start(*programs.command("load", server.address, "staff"))
        assert load.stdin
        assert load.stdout
        load.stdin.write(b"".join(LINES[:IN_WINDOW]))
        first = await load.stdout.readline()
    async with serve(database_url, listen=server.address) as restarted:
        done = await ended(load, b"".join(LINES[IN_WINDOW:]))
        again = await run(*programs.command("load", restarted.address, "staff"), stdin=b"".join(LINES))

        assert (done.err, done.status) == ("", 0)
        assert [first.decode().strip(), *done.out.splitlines()] == LOADED
        assert again.out.splitlines() == LOADED[-1:]
        assert await read_emails(restarted.database) == EMAILS


async def test_load_survives_a_connection_that_is_cut(programs: Programs, server: Server) -> None:
    """The rows in flight are sent again on another stream."""
    chunks = count()
    async with cutting_proxy(server.address, lambda _: next(chunks) == MIDDLE) as proxy:
        done = await run(*programs.command("load", proxy.address, "staff"), stdin=b"".join(LINES))

    assert (done.err, done.status) == ("", 0)
    assert done.out.splitlines() == LOADED
    assert await read_emails(server.database) == EMAILS
    assert (proxy.times, await read_streams(server)) == (1, 2)


async def test_load_sends_refused_messages_again(
    programs: Programs, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those that were sent after them, on the same stream."""
    record = LoadRepository.record
    attempts = count(1)
    refused = {3, 4, 5}  # the server tries three times before it refuses

    async def refuse(loads: LoadRepository, load: Load, offset: int, outcome: Outcome) -> None:
        if next(attempts) in refused:
            raise DatabaseUnavailable("the database has refused a commit, for a test")
        await record(loads, load, offset, outcome)

    monkeypatch.setattr(LoadRepository, "record", refuse)
    monkeypatch.setattr("service.bulk.committer.FIRST_PAUSE_SECONDS", 0)
    done = await run(*programs.command("load", server.address, "staff"), stdin=b"".join(LINES))

    assert (done.err, done.status) == ("", 0)
    assert done.out.splitlines() == LOADED
    assert await read_emails(server.database) == EMAILS
    assert await read_streams(server) == 1
    assert next(attempts) == len(SETTLED) + len(refused) + 1


@asynccontextmanager
async def users_service(**handlers: Any) -> AsyncIterator[str]:
    """The address of a server that has only these RPCs of users."""
    server = grpc.aio.server()
    server.add_registered_method_handlers("roster.v1.UserService", handlers)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def test_load_trusts_only_answers_to_its_messages(programs: Programs) -> None:
    """A load is not complete while messages have no ack."""
    streams = count(1)

    async def answer(
        requests: AsyncIterator[BulkCreateUsersRequest], _: object
    ) -> AsyncIterator[BulkWriteResponse]:
        """End the first stream too early, and acknowledge a wrong message in the second one."""
        stream = next(streams)
        await anext(requests)
        yield BulkWriteResponse(opened=BulkOpened(max_rows=5_000, max_bytes=4 << 20))
        finished = BulkWriteResponse(summary=BulkSummary(state=BulkLoad.FINISHED, created=ROWS))
        async for request in requests:
            if stream == 1 or request.finish:
                yield finished
                return
            ack = BulkAck(offset=request.offset, next_offset=request.offset + len(request.users))
            ack.offset += stream == 2
            yield BulkWriteResponse(ack=ack)

    method = grpc.stream_stream_rpc_method_handler(
        answer, BulkCreateUsersRequest.FromString, BulkWriteResponse.SerializeToString
    )
    async with users_service(BulkCreateUsers=method) as address:
        done = await run(*programs.command("load", address, "staff"), stdin=b"".join(LINES))

    assert (done.err, done.status) == ("", 0)
    assert done.out.splitlines() == LOADED
    assert next(streams) == 4


async def test_cancelled_load_ends(programs: Programs) -> None:
    """The client waits for an ack, or for a row."""

    async def open_only(
        requests: AsyncIterator[BulkCreateUsersRequest], _: object
    ) -> AsyncIterator[BulkWriteResponse]:
        await anext(requests)
        yield BulkWriteResponse(opened=BulkOpened(max_rows=1, max_bytes=4 << 20))
        async for _request in requests:
            pass

    method = grpc.stream_stream_rpc_method_handler(
        open_only, BulkCreateUsersRequest.FromString, BulkWriteResponse.SerializeToString
    )
    async with users_service(BulkCreateUsers=method) as address:
        done = await asyncio.wait_for(run(*programs.command("probe", "cancel", address)), 10)

    assert (done.err, done.out.split(), done.status) == ("", ["true"] * 10, 0)


async def test_write_with_an_unknown_outcome_is_repeated_within_its_deadline(programs: Programs) -> None:
    """The second attempt is the last one, and gets the rest of the time."""
    seconds_left: list[float] = []

    async def lose(_: CreateUserRequest, context: Any) -> User:
        seconds_left.append(context.time_remaining())
        if len(seconds_left) > 1:
            await asyncio.Event().wait()
        await asyncio.sleep(0.3)
        status = status_from_error(OutcomeUnknown("the connection broke during the commit"))
        details = (("grpc-status-details-bin", status.SerializeToString()),)
        return cast("User", await context.abort(grpc.StatusCode.INTERNAL, "lost", details))

    method = grpc.unary_unary_rpc_method_handler(lose, CreateUserRequest.FromString, User.SerializeToString)
    async with users_service(CreateUser=method) as address:
        done = await run(*programs.command("probe", "write", address))

    first, second = seconds_left
    assert second <= first - 0.25
    assert "did not answer within" in done.out


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def test_error_of_a_write_that_may_be_applied_has_its_request_id(
    programs: Programs, code: grpc.StatusCode
) -> None:
    """A proxy that loses the answer gives no reason, so the client does."""

    async def lose(_: CreateUserRequest, context: Any) -> User:
        return cast("User", await context.abort(code, "lost"))

    method = grpc.unary_unary_rpc_method_handler(lose, CreateUserRequest.FromString, User.SerializeToString)
    async with users_service(CreateUser=method) as address:
        done = await run(*programs.command("probe", "write", address))

    assert done.out.startswith("DISCONNECTED lost request_id=")


async def test_load_reports_rows_that_fail(programs: Programs, server: Server) -> None:
    """The other rows are written."""
    done = await run(*programs.command("load", server.address, "staff"), stdin=b"nobody\nada@x.org\n")

    assert done.out.splitlines() == [
        "row 0: INVALID_FIELD email",
        "2 rows are settled",
        "1 created, 1 failed",
    ]


async def test_feed_continues_after_a_restart(programs: Programs, database_url: str, tmp_path: Path) -> None:
    """Changes made while the server was away arrive; so do those made while the program was away."""
    token = tmp_path / "token"
    async with serve(database_url) as server:
        address = server.address
        feed = await start(*programs.command("feed", address, token))
        assert feed.stdout
        assert await feed.stdout.readline() == b"watching\n"
        await add_users(server.database, email="a@x.org")
        assert await feed.stdout.readline() == b"user 1 is a@x.org\n"
    async with serve(database_url) as elsewhere:
        await add_users(elsewhere.database, email="b@x.org")
    async with serve(database_url, listen=address) as server:
        assert await feed.stdout.readline() == b"user 2 is b@x.org\n"
        feed.kill()
        assert (await ended(feed)).err == ""
        await add_users(server.database, email="c@x.org")
        feed = await start(*programs.command("feed", address, token))
        assert feed.stdout
        lines = [await feed.stdout.readline()]
        if lines == [b"user 2 is b@x.org\n"]:  # it was killed before it had stored the token
            lines = [await feed.stdout.readline()]
        assert lines == [b"user 3 is c@x.org\n"]
        feed.kill()
        await ended(feed)


@pytest.fixture
async def strangers(server: Server, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """Addresses of what is not the server that a client expects."""

    async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    cert, key = Authority().issue("localhost").write(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    async with AsyncExitStack() as stack:
        addresses = {"TLS to a server without": f"tls:{server.address}"}
        for name, tls in (("HTTP", None), ("TLS", context), ("nothing", None)):
            listener = await asyncio.start_server(answer_http, "127.0.0.1", 0, ssl=tls)
            host, port = listener.sockets[0].getsockname()
            addresses[name] = f"{host}:{port}"
            if name == "nothing":
                listener.close()
            else:
                await stack.enter_async_context(listener)
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        addresses["silence"] = f"127.0.0.1:{silent.getsockname()[1]}"
        yield addresses


async def test_errors_name_address_and_cause(programs: Programs, strangers: dict[str, str]) -> None:
    """A caller with a wrong address, or wrong credentials, sees it within the deadline."""
    began = asyncio.get_running_loop().time()
    done = await run(*programs.command("probe", "wrong", *strangers.values()))
    seconds = asyncio.get_running_loop().time() - began

    said = dict(zip(strangers, done.out.splitlines(), strict=True))
    for name, address in strangers.items():
        assert f"DEADLINE_EXCEEDED no server answers at {address.removeprefix('tls:')}" in said[name]
        assert " request_id=" in said[name]  # it may have been applied
    assert "refused" in said["nothing"].lower()
    assert "(it expects TLS, or is not a gRPC server)" in said["HTTP"]
    assert "(it expects TLS, or is not a gRPC server)" in said["TLS"]
    assert "(it does not speak TLS)" in said["TLS to a server without"]
    assert seconds < 3  # of which the deadline is one


async def test_calls_without_an_answer_have_a_reason(programs: Programs, strangers: dict[str, str]) -> None:
    """As in Python: DISCONNECTED, even for a call without a deadline; not for one that the caller cancels."""
    done = await run(*programs.command("probe", "unanswered", strangers["nothing"]))

    assert (done.out.splitlines(), done.err) == (["DISCONNECTED", "true"], "")


def advice(address: str) -> str:
    """Return what the Python client says about an address, as the others say it."""
    try:
        check_address(address)
    except ValueError as error:
        said = str(error).partition("; the CA")[0]
        return f"the address {said}"
    return "<nil>"


async def test_wrong_addresses_are_refused_at_once(programs: Programs) -> None:
    """With the sentences of the Python client, which name the right address."""
    done = await run(*programs.command("probe", "addresses", *ADDRESSES))

    said = [line.partition("; for TLS")[0] for line in done.out.splitlines()]
    assert dict(zip(ADDRESSES, said, strict=True)) == {address: advice(address) for address in ADDRESSES}


def fragments(page: Path, language: str) -> str:
    """Return the fragments of a page, as one program."""
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))


@NEEDS_GO
def test_fragments_of_the_go_page_compile(tmp_path: Path) -> None:
    """In one file, with the imports that the page gives once."""
    program = tmp_path / "fragments.go"
    program.write_text(f"package fragments\n{fragments(GO / 'README.md', 'go')}")
    subprocess.run([installed("go"), "vet", "-C", GO, program], check=True)


def test_fragments_of_the_typescript_page_compile(tmp_path: Path) -> None:
    """In one module, in their order."""
    program = node()
    install_packages(tmp_path)
    (tmp_path / "node_modules/@types").symlink_to(TYPESCRIPT / "node_modules/@types")
    (tmp_path / "page.mts").write_text(fragments(TYPESCRIPT / "README.md", "ts"))
    options = ("--noEmit", "--strict", "--noUnusedLocals", "--target", "es2022", "--module", "nodenext")
    compiler = TYPESCRIPT / "node_modules/typescript/bin/tsc"
    done = subprocess.run(
        [program, compiler, *options, "--types", "node", "page.mts"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_typescript_package_has_no_install_scripts() -> None:
    """Because npm warns about them, or does not run them."""
    scripts = json.loads((TYPESCRIPT / "package.json").read_text())["scripts"]
    assert set(scripts) & {"preinstall", "install", "postinstall", "prepare"} == set()


@NEEDS_GO
def test_go_code_is_formatted_and_vetted() -> None:
    """Neither gofmt nor go vet finds anything."""
    gofmt = subprocess.run([installed("gofmt"), "-l", GO], capture_output=True, text=True, check=True)
    assert gofmt.stdout == ""
    subprocess.run([installed("go"), "vet", "-C", GO, "./..."], check=True)
