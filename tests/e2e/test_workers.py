"""Worker processes that share one address: they are replaced, and end together."""

import asyncio
import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest

from roster.v1.users_pb2 import ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.workers import reserve
from tests.support.command import ROSTER, Serving, run, serving
from tests.support.rival import rival, until

COUNTING_SECONDS = 10
CONNECTIONS = 16


def children(server: Serving) -> list[int]:
    """Return the process ids of a server's workers."""
    path = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


async def call(address: str) -> None:
    """Make a call on its own connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        await UserServiceStub(channel).ListUsers(ListUsersRequest(), wait_for_ready=True, timeout=30)


def count_calls(metrics: str) -> float:
    """Return how many calls the server's metrics count."""
    with urlopen(f"http://{metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("grpc_server_handled_total{") and 'grpc_method="ListUsers"' in line
    )


@pytest.fixture
def address() -> str:
    """A free address for the metrics."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def environment(postgresql_url: str) -> dict[str, Any]:
    """Settings for two workers on PostgreSQL."""
    return {"ROSTER_DATABASE_URL": postgresql_url, "ROSTER_WORKERS": "2"}


async def test_metrics_include_all_workers(environment: dict[str, Any], address: str, tmp_path: Path) -> None:
    """Whichever worker a connection goes to."""
    async with serving(tmp_path, **environment, ROSTER_METRICS_LISTEN=address) as server:
        await asyncio.gather(*(call(server.address) for _ in range(CONNECTIONS)))

        assert len(children(server)) == 2
        # A call is counted after its response.
        async with asyncio.timeout(COUNTING_SECONDS):
            while await asyncio.to_thread(count_calls, address) < CONNECTIONS:
                pass
        assert await asyncio.to_thread(count_calls, address) == CONNECTIONS


async def test_dead_worker_is_replaced(environment: dict[str, Any], tmp_path: Path) -> None:
    """The others serve meanwhile."""
    async with serving(tmp_path, **environment) as server:
        before = children(server)
        os.kill(before[0], signal.SIGKILL)
        await server.said("ended with status -9")
        await call(server.address)
        await until(partial(has_replaced, server, before[0]))


async def has_replaced(server: Serving, dead: int) -> bool:
    now = children(server)
    return len(now) == 2 and dead not in now


async def test_workers_end_with_the_server(environment: dict[str, Any], tmp_path: Path) -> None:
    """On SIGTERM the status is 0, and no process remains."""
    async with serving(tmp_path, **environment) as server:
        workers = children(server)
        server.signal(signal.SIGTERM)
        assert (await server.ended()).status == 0
    assert living(workers) == []


async def test_workers_end_when_the_server_is_killed(environment: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise they would keep the port."""
    async with serving(tmp_path, **environment) as server:
        workers = children(server)
        server.signal(signal.SIGKILL)
        await until(partial(are_gone, workers))


async def test_second_signal_ends_all_processes(environment: dict[str, Any], tmp_path: Path) -> None:
    """Whatever is in flight; no process keeps the port."""
    url = environment["ROSTER_DATABASE_URL"]
    async with serving(tmp_path, **environment, ROSTER_GRACE="300") as server, rival(url) as other:
        workers = children(server)
        await other.execute("LOCK TABLE users")
        async with grpc.aio.insecure_channel(server.address) as channel:
            waits = UserServiceStub(channel).ListUsers(ListUsersRequest())
            await other.wait_for_blocked()
            server.signal(signal.SIGTERM)
            await server.said("stopping")
            server.signal(signal.SIGTERM)
            await server.ended()
            assert living(workers) == []
            waits.cancel()


async def test_cpu_time_does_not_decrease_when_a_worker_ends(
    environment: dict[str, Any], address: str, tmp_path: Path
) -> None:
    """Prometheus would see a reset, and count the other workers' time again."""
    async with serving(tmp_path, **environment, ROSTER_METRICS_LISTEN=address) as server:
        await asyncio.gather(*(call(server.address) for _ in range(CONNECTIONS)))
        before = await asyncio.to_thread(cpu_seconds, address)
        os.kill(children(server)[0], signal.SIGKILL)
        await server.said("ended with status -9")
        assert await asyncio.to_thread(cpu_seconds, address) >= before > 0


def cpu_seconds(metrics: str) -> float:
    """Return the CPU time in the server's metrics."""
    with urlopen(f"http://{metrics}/metrics") as page:
        lines = page.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("process_cpu_seconds_total ")))


async def are_gone(pids: list[int]) -> bool:
    return not living(pids)


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def test_shared_port_is_refused(environment: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise the kernel would distribute calls over the workers of two servers."""
    async with serving(tmp_path, **environment) as server:
        second = await run(ROSTER, "serve", folder=tmp_path, **environment, ROSTER_LISTEN=server.address)

    assert second.status == 2
    assert f"can't listen on {server.address}" in second.err


async def test_failure_to_start_is_reported_once(environment: dict[str, Any], tmp_path: Path) -> None:
    """It ends the server, as without workers."""
    environment["ROSTER_DATABASE_URL"] += "_missing"
    ended = await run(ROSTER, "serve", folder=tmp_path, **environment, ROSTER_LISTEN="127.0.0.1:0")

    assert ended.status == 2
    assert ended.err.count("the database refused the connection") == 1


@pytest.mark.parametrize(
    ("listen", "url"),
    [("127.0.0.1:0", "sqlite:///roster.db"), ("unix:roster.sock", "postgresql://ada@127.0.0.1/roster")],
    ids=["sqlite", "unix socket"],
)
async def test_workers_need_postgresql_and_a_port(listen: str, url: str, tmp_path: Path) -> None:
    """SQLite has one writer, and a Unix socket one process."""
    ended = await run(
        ROSTER, "serve", folder=tmp_path, ROSTER_WORKERS="2", ROSTER_LISTEN=listen, ROSTER_DATABASE_URL=url
    )

    assert ended.status == 2
    assert "ROSTER_WORKERS must be 1 with " in ended.err


def test_closed_connections_do_not_block_the_port() -> None:
    """They stay in TIME_WAIT for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = before.accept()
            connection.close()  # the side that ends first waits
            assert client.recv(1) == b""

    with reserve(f"127.0.0.1:{port}", "ROSTER_LISTEN") as address:
        assert address == f"127.0.0.1:{port}"
