"""How a server stops, as its callers see it, and what one says that can't start."""

import asyncio
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from prometheus_client import generate_latest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOptions, BulkSummary
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.client import BulkLoader, channel, pages
from service.interceptors.chain import Rpc
from service.interceptors.drain import Drain
from service.server import Server
from service.settings import Settings
from tests.support.command import ROSTER, run, serving, waiting_to_serve
from tests.support.errors import refusal
from tests.support.rival import rival
from tests.support.scrape import Scrape

ADA = User(email="ada@example.org")
RESTARTS = 2
BATCH = 50
SLOW_COMMIT = [
    (
        "CREATE FUNCTION wait() RETURNS trigger AS "
        "'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END' LANGUAGE plpgsql"
    ),
    (
        "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON users "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
    ),
]


async def opened(users: UserServiceStub) -> Any:
    """A bulk stream that the server has opened, and that waits for rows."""
    load: Any = users.BulkCreateUsers()
    await load.write(BulkCreateUsersRequest(options=BulkOptions(load_id="staff")))
    assert (await load.read()).HasField("opened")
    return load


async def test_a_start_that_waits_for_the_database_ends_without_a_pause(tmp_path: Path) -> None:
    """No load balancer knows of it yet."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and doesn't listen
        url = f"postgresql://ada@127.0.0.1:{nobody.getsockname()[1]}/roster"
        settings = {"ROSTER_DATABASE_URL": url, "ROSTER_DRAIN_PAUSE": "25", "ROSTER_GRACE": "60"}
        async with waiting_to_serve(tmp_path, **settings) as server:
            await server.said("trying again in")
            server.signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert (await server.ended()).status == 0


async def test_bulk_stream_finishes_received_batches_before_server_stops(
    server: Server, users: UserServiceStub
) -> None:
    """It acknowledges a batch that waits for its commit, then reports the watermark to continue from."""
    load = await opened(users)
    async with AsyncExitStack() as stack:
        # All connections for loads are taken, so that the stop comes before the commit.
        for _ in range(1 if server.database.is_sqlite else server.settings.bulk_connections):
            await stack.enter_async_context(server.database.bulk())
        await load.write(BulkCreateUsersRequest(users=[ADA]))
        while not Scrape(generate_latest().decode()).value("roster_bulk_rows_uncommitted"):  # noqa: ASYNC110
            await asyncio.sleep(0)
        stopping = asyncio.create_task(server.stop())
        await asyncio.wait([stopping], timeout=0)

    assert (await load.read()).ack.created == 1
    summary = (await load.read()).summary
    assert (summary.next_offset, summary.state) == (1, BulkLoad.OPEN)
    refused = await refusal(load.read())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refused.facts == {"next_offset": "1"}
    await stopping


async def test_calls_that_come_while_others_end_are_waited_for_too() -> None:
    """GRPC hands on what it has accepted, also when a stop has begun."""
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


async def test_a_batch_in_hand_is_acknowledged_before_the_end(postgresql_url: str) -> None:
    """Also one that waits for a lock when the stop comes."""
    server = await started(postgresql_url)
    async with grpc.aio.insecure_channel(server.address) as connection, rival(postgresql_url) as other:
        load = await opened(UserServiceStub(connection))
        await other.execute("LOCK TABLE users")
        await load.write(BulkCreateUsersRequest(users=[ADA]))
        await other.waiting()
        stopping = asyncio.create_task(server.stop())
        await asyncio.wait([stopping], timeout=0)
        await other.rollback()

        assert (await load.read()).ack.created == 1
        assert (await load.read()).summary.next_offset == 1
        await stopping


async def test_a_call_that_outlasts_the_grace_is_told_to_try_again(postgresql_url: str) -> None:
    """With a reason and a pause, not as a connection that broke; nothing of it is in."""
    server = await started(postgresql_url)
    async with grpc.aio.insecure_channel(server.address) as connection, rival(postgresql_url) as other:
        await other.execute("LOCK TABLE users")
        call = UserServiceStub(connection).CreateUser(CreateUserRequest(user=ADA))
        await other.waiting()
        stopping = asyncio.create_task(server.stop(grace=0.1))

        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refused.retry_seconds is not None
        await stopping
        await other.rollback()
    assert await emails_in(postgresql_url) == []


async def test_a_call_that_never_sends_its_message_holds_no_stop(database_url: str) -> None:
    """Nor one that gRPC has accepted and never hands on: its client tries again, long before its deadline."""
    server = await started(database_url)
    async with grpc.aio.insecure_channel(server.address) as connection:
        call: Any = connection.stream_unary("/roster.v1.UserService/GetUser")()
        await call.wait_for_connection()
        await HealthStub(connection).Check(HealthCheckRequest())  # behind it on the same connection
        async with asyncio.timeout(20):
            await server.stop(grace=60)
        assert await call.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


async def test_a_client_that_asks_for_the_contract_holds_no_stop(database_url: str) -> None:
    """As grpcurl, which keeps the stream open while it waits for its own input."""
    server = await started(database_url)
    async with grpc.aio.insecure_channel(server.address) as connection:
        call: Any = ServerReflectionStub(connection).ServerReflectionInfo()
        await call.write(ServerReflectionRequest(list_services=""))
        assert (await call.read()).HasField("list_services_response")
        async with asyncio.timeout(20):
            await server.stop(grace=60)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_write_that_is_in_is_not_told_to_be_sent_again(postgresql_url: str) -> None:
    """A call that is cut off during its commit: without a request_id it would happen twice."""
    engine = create_async_engine(postgresql_url)
    async with engine.begin() as connection:
        for statement in SLOW_COMMIT:
            await connection.execute(text(statement))
    await engine.dispose()
    server = await started(postgresql_url)
    async with grpc.aio.insecure_channel(server.address) as channel_, rival(postgresql_url) as other:
        await other.execute("SELECT pg_advisory_xact_lock(1)")
        call = UserServiceStub(channel_).CreateUser(CreateUserRequest(user=ADA))
        await other.waiting()
        server.drain.cut_off()
        await other.rollback()

        assert (await refusal(call)).reason == "OUTCOME_UNKNOWN"
    await server.stop(grace=0)
    assert await emails_in(postgresql_url) == [ADA.email]


async def test_health_says_so_before_calls_are_refused(database_url: str) -> None:
    """Load balancers have a pause to notice; a call that comes in it is answered."""
    server = await started(database_url, drain_pause=1, grace=4)
    async with grpc.aio.insecure_channel(server.address) as connection:
        watch: Any = HealthStub(connection).Watch(HealthCheckRequest())
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        stopping = asyncio.create_task(server.stop())
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING

        created = await UserServiceStub(connection).CreateUser(CreateUserRequest(user=ADA))
        assert created.email == ADA.email
        await stopping


async def test_a_rolling_restart_is_no_error_and_no_loss(postgresql_url: str, tmp_path: Path) -> None:
    """Calls and a bulk load go on through servers in turn on one address; all is there, and once."""
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


async def calls(users: UserServiceStub, name: str, is_over: asyncio.Event) -> list[str]:
    """Create one user after the other until it is over; return their e-mails."""
    created: list[str] = []
    while not is_over.is_set():
        user = User(email=f"{name}-{len(created)}@example.org")
        created.append((await users.CreateUser(CreateUserRequest(user=user))).email)
    return created


async def rows(is_over: asyncio.Event) -> AsyncGenerator[User, None]:
    """Users without an end, until it is over."""
    number = 0
    while not is_over.is_set():
        yield User(email=f"row-{number}@example.org")
        number += 1
        await asyncio.sleep(0)


async def acknowledged(events: Any) -> None:
    """Wait until some more rows of a load are in."""
    async for event in events:
        if isinstance(event, BulkAck):
            return


async def test_a_schema_that_is_newer_is_not_to_be_migrated(postgresql_url: str, tmp_path: Path) -> None:
    """It says so, as `roster migrate` would be the wrong advice."""
    engine = create_async_engine(postgresql_url)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await engine.dispose()
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=postgresql_url)

    assert ended.status == 2
    assert "the schema is at revision 9999, which is newer than this release" in ended.err


async def test_a_socket_without_a_folder_is_refused(tmp_path: Path) -> None:
    """With the folder that is missing."""
    ended = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN=f"unix:{tmp_path}/run/roster.sock")

    assert ended.status == 2
    assert f"the folder {tmp_path}/run does not exist; create it first" in ended.err


async def started(database_url: str, **values: Any) -> Server:
    """A server of the test's own, which the test stops."""
    server = Server(Settings(database_url=database_url, listen="127.0.0.1:0", metrics_listen="", **values))
    await server.start()
    return server


async def emails_in(url: str) -> list[str]:
    """Who is in the database."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        emails = [email for (email,) in await connection.execute(text("SELECT email FROM users"))]
    await engine.dispose()
    return emails


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
