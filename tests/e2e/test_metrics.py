"""The metrics that a real server reports to Prometheus."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from time import perf_counter

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.multiprocess import mark_process_dead

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service import metrics
from service.server import Server
from service.settings import Settings
from service.users.passwords import Passwords
from tests.support.errors import refusal
from tests.support.scrape import Scrape
from tests.support.server import FREE_PORT, serve

NOT_FOUND = grpc.StatusCode.NOT_FOUND
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def server(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """A server with a metrics port, one connection for calls and a queue of one password."""

    async def delete_nothing(_: Server) -> None:
        """Its connections would be counted too."""

    monkeypatch.setattr(Server, "_delete_expired", delete_nothing)
    for level in (metrics.POOL_SIZE, metrics.POOL_IN_USE):
        level.clear()  # other tests' databases may not be collected yet
    async with serve(
        database_url,
        metrics_listen=FREE_PORT,
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.5,
        password_queue=1,
    ) as server:
        yield server


async def test_counts_and_times_calls_by_method_and_code(server: Server, users: UserServiceAsyncStub) -> None:
    """Names and labels are those of go-grpc-middleware."""
    before = await Scrape.of(server.metrics_address)
    await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
    began = perf_counter()
    await users.GetUser(GetUserRequest(email="ada@example.org"))
    await refusal(users.GetUser(GetUserRequest(id=99)))
    after = await Scrape.at_rest(server.metrics_address)
    elapsed = perf_counter() - began

    get = {"grpc_service": "roster.v1.UserService", "grpc_method": "GetUser", "grpc_type": "unary"}
    assert after.since(before, "grpc_server_started_total", **get) == 2
    assert after.since(before, "grpc_server_handled_total", **get, grpc_code="OK") == 1
    assert after.since(before, "grpc_server_handled_total", **get, grpc_code="NotFound") == 1
    assert after.since(before, "grpc_server_handling_seconds_count", **get) == 2
    assert 0 < after.since(before, "grpc_server_handling_seconds_sum", **get) < elapsed


async def test_measures_gathered_reads(database_url: str) -> None:
    """Of eight calls that wait for the only connection, seven share a statement, which is measured too."""
    async with (
        serve(database_url, metrics_listen=FREE_PORT, pool_size=1, max_overflow=0) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        users = UserServiceStub(channel)
        await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
        async with server.database.read() as session:
            await session.connection()
            before = scrape = await Scrape.of(server.metrics_address)
            calls = [users.GetUser(GetUserRequest(email="ada@example.org")) for _ in range(8)]
            while scrape.value("roster_calls_in_flight", grpc_method="GetUser") < 8:
                scrape = await Scrape.of(server.metrics_address)
        await asyncio.gather(*calls)

        after = await Scrape.of(server.metrics_address)
    assert after.since(before, "roster_gathered_reads_sum") == 8
    assert after.since(before, "roster_gathered_reads_count") == 2
    # The health check may have sent one too.
    assert after.since(before, "roster_statement_seconds_count", operation="select") >= 1


@on_sqlite
async def test_counts_cancelled_calls(server: Server, users: UserServiceAsyncStub) -> None:
    """They have a code, although no client receives it."""
    before = await Scrape.of(server.metrics_address)
    call = users.BulkCreateUsers()
    await call.write(BulkCreateUsersRequest(options=BulkOptions(load_id="left")))
    await call.read()
    bulk = {"grpc_method": "BulkCreateUsers", "grpc_type": "bidi_stream"}
    assert (await Scrape.of(server.metrics_address)).value("roster_calls_in_flight", **bulk) == 1

    call.cancel()
    after = await Scrape.of(server.metrics_address)
    while not after.since(before, "grpc_server_handled_total", **bulk):
        after = await Scrape.of(server.metrics_address)
    assert after.since(before, "grpc_server_handled_total", **bulk, grpc_code="Canceled") == 1
    assert after.value("roster_calls_in_flight", **bulk) == 0


async def test_counts_bulk_rows_by_outcome(server: Server, users: UserServiceAsyncStub) -> None:
    """Batches, their sizes, durations and refusals are measured too."""
    before = await Scrape.of(server.metrics_address)
    options = BulkOptions(load_id="counted", on_conflict=BulkOptions.SKIP)
    rows = [User(email=email) for email in ("ada@example.org", "ada@example.org", "nobody")]
    messages = [
        BulkCreateUsersRequest(options=options, users=rows),
        BulkCreateUsersRequest(offset=0, users=rows[:1]),
        BulkCreateUsersRequest(offset=9, users=rows),
    ]
    async for _ in users.BulkCreateUsers(iter(messages)):
        pass

    after = await Scrape.of(server.metrics_address)
    outcomes = ("created", "updated", "skipped", "failed", "replayed")
    counted = {
        outcome: after.since(before, "roster_bulk_rows_total", operation="BulkCreateUsers", outcome=outcome)
        for outcome in outcomes
    }
    assert counted == {"created": 1, "updated": 0, "skipped": 1, "failed": 1, "replayed": 1}
    assert after.since(before, "roster_bulk_refused_total", reason="OFFSET_GAP") == 1
    assert after.since(before, "roster_bulk_batch_rows_count", operation="BulkCreateUsers") == 2
    assert after.since(before, "roster_bulk_batch_rows_sum", operation="BulkCreateUsers") == 4
    assert after.since(before, "roster_bulk_batch_seconds_count", operation="BulkCreateUsers") == 2
    assert after.value("roster_bulk_rows_uncommitted") == 0


async def test_reports_uncommitted_rows_and_waiting_batches(
    server: Server, users: UserServiceAsyncStub
) -> None:
    """A batch waits while all connections for loads are in use."""
    pool = "writer" if server.database.is_sqlite else "bulk"
    async with AsyncExitStack() as stack:
        for _ in range(1 if server.database.is_sqlite else server.settings.bulk_connections):
            await stack.enter_async_context(server.database.bulk())
        call = users.BulkCreateUsers()
        await call.write(BulkCreateUsersRequest(users=[User(email="ada@example.org")], finish=True))
        await call.read()
        scrape = await Scrape.of(server.metrics_address)
        while not (
            scrape.value("roster_pool_waiting", pool=pool) and scrape.value("roster_bulk_rows_uncommitted")
        ):
            scrape = await Scrape.of(server.metrics_address)

    assert scrape.value("roster_pool_waiting", pool=pool) == 1
    assert scrape.value("roster_bulk_rows_uncommitted") == 1
    await call.read()
    assert (await Scrape.of(server.metrics_address)).value("roster_bulk_rows_uncommitted") == 0


async def test_reports_size_use_and_timeouts_of_the_pool(server: Server, users: UserServiceAsyncStub) -> None:
    """While the only connection is in use, a call times out."""
    pool = "readers" if server.database.is_sqlite else "calls"
    async with server.database.read() as session:
        await session.connection()
        before = await Scrape.of(server.metrics_address)
        assert before.value("roster_pool_connections", pool=pool) == 1
        assert before.value("roster_pool_connections_in_use", pool=pool) == 1
        assert (await refusal(users.GetUser(GetUserRequest(id=1)))).reason == "POOL_EXHAUSTED"

    after = await Scrape.of(server.metrics_address)
    # The health check may have waited for a connection too.
    assert after.since(before, "roster_pool_timeouts_total", pool=pool) >= 1
    assert after.value("roster_pool_connections_in_use", pool=pool) == 0


async def test_closed_database_has_no_connections(server: Server) -> None:
    """All gauges return to zero."""
    async with server.database.begin() as session:
        await session.connection()
    await server.database.close()

    scrape = await Scrape.of(server.metrics_address)
    assert scrape.value("roster_pool_connections_in_use") == 0
    assert scrape.value("roster_pool_connections") == 0


async def test_measures_statements_by_operation(server: Server, users: UserServiceAsyncStub) -> None:
    """Including failed ones, and COPY, which bypasses SQLAlchemy."""
    before = await Scrape.of(server.metrics_address)
    for _ in range(2):
        async for _ in users.BulkCreateUsers(
            iter([BulkCreateUsersRequest(users=[User(email="ada@example.org")], finish=True)])
        ):
            pass
    async for _ in users.ExportUsers(ExportUsersRequest()):
        pass

    after = await Scrape.of(server.metrics_address)
    operation = "insert" if server.database.is_sqlite else "copy"
    assert after.since(before, "roster_statement_seconds_count", operation=operation) == 2
    assert after.since(before, "roster_statement_seconds_count", operation="select") > 0
    assert after.since(before, "roster_statement_seconds_sum", operation="select") > 0


@on_sqlite
async def test_counts_refused_password_checks(server: Server, users: UserServiceAsyncStub) -> None:
    """The second of two concurrent checks is refused, because the queue has one place."""
    before = await Scrape.of(server.metrics_address)
    request = VerifyPasswordRequest(email="nobody@example.org", password="secret")
    answers = await asyncio.gather(*(users.VerifyPassword(request) for _ in range(2)), return_exceptions=True)
    assert [isinstance(answer, grpc.RpcError) for answer in answers].count(True) == 1

    after = await Scrape.of(server.metrics_address)
    assert after.since(before, "roster_password_hashes_refused_total") == 1
    assert after.value("roster_password_hashes_pending") == 0


async def test_reports_pending_password_hashes() -> None:
    """A hash is pending until it is done, so that the queue can be watched."""
    passwords = Passwords(Settings(password_workers=1, password_queue=2))
    hashings = [asyncio.create_task(passwords.hash("secret")) for _ in range(2)]
    await asyncio.sleep(0)  # both start
    assert Scrape(generate_latest().decode()).value("roster_password_hashes_pending") == 2

    await asyncio.gather(*hashings)
    assert Scrape(generate_latest().decode()).value("roster_password_hashes_pending") == 0
    passwords.close()


@on_sqlite
async def test_reports_figures_of_the_process(server: Server) -> None:
    """CPU time, memory and open files."""
    scrape = await Scrape.of(server.metrics_address)
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"):
        assert scrape.value(name) > 0


async def test_configured_metrics_port_must_be_free(sqlite_url: str) -> None:
    """Otherwise metrics would be missing unnoticed."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match="set ROSTER_METRICS_LISTEN to another address"):
            async with serve(sqlite_url, metrics_listen=taken):
                pass


async def test_default_metrics_port_may_be_taken(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second server on a machine starts without metrics."""
    monkeypatch.delenv("ROSTER_METRICS_LISTEN")
    with ExitStack() as stack:
        with suppress(OSError):  # somebody has it already
            stack.enter_context(socket.create_server(("127.0.0.1", 9464)))
        async with serve(sqlite_url) as server, grpc.aio.insecure_channel(server.address) as channel:
            assert server.metrics_address == ""
            assert (await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1)))).code == NOT_FOUND


WORKER = """
from service.metrics import BULK_LAG, STARTED
STARTED.labels("unary", "service", "method").inc(2)
BULK_LAG.inc(3)
print(flush=True)
input()
"""


def test_sums_the_metrics_of_workers(tmp_path: Path) -> None:
    """Counters include workers that have ended; gauges and process figures do not."""
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    living = [worker.pid for worker in started]
    for worker in started:
        assert worker.stdout
        worker.stdout.readline()
    registry = metrics.sum_workers(str(tmp_path), lambda: living)
    both = Scrape(generate_latest(registry).decode())
    assert both.value("grpc_server_started_total", grpc_method="method") == 4
    assert both.value("roster_bulk_rows_uncommitted") == 6

    started[0].communicate(b"\n")
    mark_process_dead(living.pop(0), str(tmp_path))  # type: ignore[no-untyped-call]
    one = Scrape(generate_latest(registry).decode())
    assert one.value("grpc_server_started_total", grpc_method="method") == 4
    assert one.value("roster_bulk_rows_uncommitted") == 3
    assert 0 < one.value("process_resident_memory_bytes") < both.value("process_resident_memory_bytes")
    started[1].communicate(b"\n")
