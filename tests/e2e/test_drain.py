"""How a server stops, as its callers see it, and how a server that can't start reports why."""

import asyncio
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from prometheus_client import generate_latest
from sqlalchemy import text

from roster.client import BulkLoader, channel, pages
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOptions, BulkSummary
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    ExportUsersResponse,
    GetUserRequest,
    ListUsersRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service.changes.export import Exports
from service.db.engine import Database
from service.interceptors.chain import Rpc
from service.interceptors.drain import Drain
from service.server import Server
from service.users import servicer
from tests.support.command import ROSTER, run, serving, waiting_to_serve
from tests.support.errors import refusal
from tests.support.load_stream import LoadStream
from tests.support.rival import LOCK_COMMITS, delay_commits, rival
from tests.support.rows import read_emails
from tests.support.scrape import Scrape
from tests.support.server import serve

ADA = User(email="ada@example.org")
RESTARTS = 2
BATCH = 50
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


async def test_server_stops_at_once_while_it_waits_for_its_database(tmp_path: Path) -> None:
    """The drain pause is skipped: no load balancer knows the server yet."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # but do not listen
        url = f"postgresql://ada@127.0.0.1:{nobody.getsockname()[1]}/roster"
        settings = {"ROSTER_DATABASE_URL": url, "ROSTER_DRAIN_PAUSE": "25", "ROSTER_GRACE": "60"}
        async with waiting_to_serve(tmp_path, **settings) as server:
            await server.said("trying again in")
            server.signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert (await server.ended()).status == 0


async def test_bulk_stream_finishes_received_batches_before_server_stops(
    server: Server, users: UserServiceAsyncStub
) -> None:
    """It acknowledges the batches that wait for their commits, then reports where to continue."""
    load = await LoadStream.open(users)
    async with AsyncExitStack() as stack:
        # All connections for loads are taken, so that the stop begins before the first commit.
        for _ in range(1 if server.database.is_sqlite else server.settings.bulk_connections):
            await stack.enter_async_context(server.database.bulk())
        await load.send("ada")
        await load.send("bob")
        while Scrape(generate_latest().decode()).value("roster_bulk_rows_uncommitted") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        stopping = asyncio.create_task(server.stop())
        await asyncio.wait([stopping], timeout=0)

    acks = [(await load.answer()).ack for _ in range(2)]
    assert [(ack.created, ack.next_offset) for ack in acks] == [(1, 1), (1, 2)]
    summary = await load.summary()
    assert (summary.next_offset, summary.state) == (2, BulkLoad.OPEN)
    refused = await refusal(load.answer())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refused.facts == {"next_offset": "2"}
    await stopping


async def test_stop_also_waits_for_calls_that_arrive_during_it() -> None:
    """GRPC passes on the calls that it accepted before the stop began."""
    drain, ends = Drain(), [asyncio.Event() for _ in range(2)]
    get_user = Rpc("/roster.v1.UserService/GetUser", GetUserRequest, is_upload=False, is_download=False)
    context: Any = None

    async def call(end: asyncio.Event) -> None:
        async def wait(*_: object) -> None:
            await end.wait()

        await drain.intercept(get_user, wait)(None, context)

    calls = [asyncio.create_task(call(ends[0]))]
    await asyncio.sleep(0)
    waiting = asyncio.create_task(drain.wait(60))
    await asyncio.sleep(0)
    calls.append(asyncio.create_task(call(ends[1])))
    ends[0].set()
    await calls[0]
    await asyncio.wait([waiting], timeout=0)
    assert not waiting.done()

    ends[1].set()
    await waiting
    assert calls[1].done()


@on_postgresql
async def test_batch_waiting_for_lock_is_acknowledged_before_server_stops(
    database_url: str, server: Server, users: UserServiceAsyncStub
) -> None:
    """Its transaction has begun when the stop begins."""
    async with rival(database_url) as other:
        load = await LoadStream.open(users)
        await other.execute("LOCK TABLE users")
        await load.send("ada")
        await other.wait_for_blocked()
        stopping = asyncio.create_task(server.stop())
        await asyncio.wait([stopping], timeout=0)
        await other.rollback()

        assert (await load.answer()).ack.created == 1
        assert (await load.summary()).next_offset == 1
        await stopping


@on_postgresql
async def test_call_that_outlasts_grace_is_refused_as_retryable(
    database_url: str, database: Database, server: Server, users: UserServiceAsyncStub
) -> None:
    """The error has a reason and a delay, and the call has written nothing."""
    async with rival(database_url) as other:
        await other.execute("LOCK TABLE users")
        call = users.CreateUser(CreateUserRequest(user=ADA))
        await other.wait_for_blocked()
        stopping = asyncio.create_task(server.stop(grace=0.1))

        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refused.retry_seconds is not None
        await stopping
        await other.rollback()
    assert await read_emails(database) == []


async def test_call_without_a_message_does_not_delay_a_stop(
    server: Server, channel: grpc.aio.Channel
) -> None:
    """GRPC accepts such a call, but never passes it on. Its client retries long before its deadline."""
    call: Any = channel.stream_unary("/roster.v1.UserService/GetUser")()
    await call.wait_for_connection()
    await HealthStub(channel).Check(HealthCheckRequest())  # sent after the call, on the same connection
    async with asyncio.timeout(20):
        await server.stop(grace=60)
    assert await call.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


async def test_reflection_stream_does_not_delay_a_stop(server: Server, channel: grpc.aio.Channel) -> None:
    """The client grpcurl keeps this stream open while it waits for its own input."""
    call: Any = ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(ServerReflectionRequest(list_services=""))
    assert (await call.read()).HasField("list_services_response")
    async with asyncio.timeout(20):
        await server.stop(grace=60)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


@on_postgresql
async def test_call_cut_off_during_its_commit_has_unknown_outcome(
    database_url: str, database: Database, server: Server, users: UserServiceAsyncStub
) -> None:
    """A retryable error would let a client without a request_id write twice."""
    await delay_commits(database_url)
    async with rival(database_url) as other:
        await other.execute(LOCK_COMMITS)
        call = users.CreateUser(CreateUserRequest(user=ADA))
        await other.wait_for_blocked()
        server.drain.cut_off()
        await other.rollback()

        assert (await refusal(call)).reason == "OUTCOME_UNKNOWN"
    await server.stop(grace=0)
    assert await read_emails(database) == [ADA.email]


@on_sqlite
@pytest.mark.parametrize(("is_dry_run", "reason"), [(False, "OUTCOME_UNKNOWN"), (True, "DRAINING")])
async def test_call_cut_off_while_it_sends_its_header_gets_a_status(
    is_dry_run: bool,
    reason: str,
    server: Server,
    users: UserServiceAsyncStub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without one, the client would wait for its deadline and not learn whether to send the call again."""

    def cut_off(*_: object) -> None:
        asyncio.get_running_loop().call_soon(server.drain.cut_off)

    monkeypatch.setattr(servicer, "note_effect", cut_off)
    request = CreateUserRequest(user=ADA, on_conflict=BulkOptions.SKIP, validate_only=is_dry_run)
    call = users.CreateUser(request, timeout=5)
    assert (await refusal(call)).reason == reason


@on_sqlite
async def test_stream_cut_off_while_it_sends_its_header_gets_a_status(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a call with one response."""

    async def export(*_: Any) -> AsyncGenerator[ExportUsersResponse]:
        asyncio.get_running_loop().call_soon(server.drain.cut_off)
        yield ExportUsersResponse()

    monkeypatch.setattr(Exports, "run", export)
    call: Any = users.ExportUsers(ExportUsersRequest(), timeout=5)
    assert (await refusal(call.read())).reason == "DRAINING"


async def test_health_changes_before_calls_are_refused(database_url: str) -> None:
    """During the drain pause load balancers notice the stop, and calls are still answered."""
    async with (
        serve(database_url, drain_pause=1, grace=4) as server,
        grpc.aio.insecure_channel(server.address) as connection,
    ):
        watch: Any = HealthStub(connection).Watch(HealthCheckRequest())
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        stopping = asyncio.create_task(server.stop())
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING

        created = await UserServiceStub(connection).CreateUser(CreateUserRequest(user=ADA))
        assert created.email == ADA.email
        await stopping


async def test_rolling_restart_causes_no_errors_and_no_loss(postgresql_url: str, tmp_path: Path) -> None:
    """Calls and a bulk load continue on the next server at the address, and each row is written once."""
    address = f"127.0.0.1:{free_port()}"
    environment = {"ROSTER_LISTEN": address, "ROSTER_DATABASE_URL": postgresql_url}
    is_over = asyncio.Event()
    async with channel(address, timeout=60) as connection:
        users = UserServiceStub(connection)
        loader = BulkLoader(users.BulkCreateUsers, BulkCreateUsersRequest, batch_rows=BATCH)
        calling = [asyncio.create_task(calls(users, name, is_over)) for name in ("a", "b")]
        async with aclosing(loader.run(rows(is_over))) as events:
            loading = aiter(events)
            for _ in range(RESTARTS):
                async with serving(tmp_path, **environment) as server:
                    await acknowledged(loading)
                    server.signal(signal.SIGTERM)
                    assert (await server.ended()).status == 0
            async with serving(tmp_path, **environment):
                await acknowledged(loading)
                is_over.set()
                *_, summary = [event async for event in loading]
                assert isinstance(summary, BulkSummary)
                created = [email for emails in await asyncio.gather(*calling) for email in emails]
                in_store = [
                    user.email async for user in pages(users.ListUsers, ListUsersRequest(page_size=1000))
                ]

    loaded = [f"row-{number}@example.org" for number in range(summary.created)]
    assert sorted(in_store) == sorted(created + loaded)


async def calls(users: UserServiceAsyncStub, name: str, is_over: asyncio.Event) -> list[str]:
    """Create users one by one until the event is set, and return their e-mails."""
    created: list[str] = []
    while not is_over.is_set():
        user = User(email=f"{name}-{len(created)}@example.org")
        created.append((await users.CreateUser(CreateUserRequest(user=user))).email)
    return created


async def rows(is_over: asyncio.Event) -> AsyncGenerator[User, None]:
    """Yield new users until the event is set."""
    number = 0
    while not is_over.is_set():
        yield User(email=f"row-{number}@example.org")
        number += 1
        await asyncio.sleep(0)


async def acknowledged(events: Any) -> None:
    """Wait until the next batch of a load is acknowledged."""
    async for event in events:
        if isinstance(event, BulkAck):
            return


@on_postgresql
async def test_server_refuses_a_newer_schema(database_url: str, database: Database, tmp_path: Path) -> None:
    """The error advises to use the newer release."""
    async with database.begin() as session:
        await session.execute(text("UPDATE roster_schema SET version_num = '9999'"))
        await session.execute(text("UPDATE schema_compatibility SET min_revision = '9999'"))
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=database_url)

    assert ended.status == 2
    assert "the schema is at revision 9999, which is newer than this release" in ended.err


async def test_server_refuses_a_socket_in_a_missing_folder(tmp_path: Path) -> None:
    """The error names the folder."""
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN=f"unix:{tmp_path}/run/roster.sock")

    assert ended.status == 2
    assert f"the folder {tmp_path}/run does not exist; create it first" in ended.err


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
