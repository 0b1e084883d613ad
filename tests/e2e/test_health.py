"""The port that serves only the health service, for probes without TLS."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service import health
from service.metrics import READY
from service.server import Server
from tests.support.errors import refusal
from tests.support.server import FREE_PORT, serve

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server(sqlite_url: str) -> AsyncIterator[Server]:
    """A server with a health port."""
    async with serve(sqlite_url, health_listen=FREE_PORT) as server:
        yield server


@pytest.fixture
async def probes(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the health port."""
    async with grpc.aio.insecure_channel(server.health_address) as channel:
        yield channel


@pytest.mark.parametrize("service", ["", "roster.v1.UserService", "live"])
async def test_health_port_answers_probes(probes: grpc.aio.Channel, service: str) -> None:
    """Readiness of the server and of a service, and liveness, as on the main port."""
    assert (await HealthStub(probes).Check(HealthCheckRequest(service=service))).status == SERVING


async def test_health_port_serves_no_data(probes: grpc.aio.Channel) -> None:
    """Any other service is unimplemented there."""
    refused = await refusal(UserServiceStub(probes).GetUser(GetUserRequest(id=1)))
    assert refused.code == grpc.StatusCode.UNIMPLEMENTED


async def test_hanging_database_is_reported_after_two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen database does not refuse connections, so each check has a timeout."""
    monkeypatch.setattr(health, "INTERVAL_SECONDS", 0.01)
    looks = health.Health(Frozen(), [])  # type: ignore[arg-type]
    for status in (SERVING, NOT_SERVING):
        await looks.check_database()
        assert looks._server_status[""] == status
        assert READY._value.get() == (status == SERVING)


class Frozen:
    """A database that never answers."""

    async def ping(self) -> None:
        await asyncio.Event().wait()

    def doubt(self) -> None:
        """Nobody looks for another one."""


async def test_stopping_server_is_alive(server: Server, probes: grpc.aio.Channel) -> None:
    """An orchestrator that restarted it would cut off calls in flight."""
    await server.health.enter_graceful_shutdown()

    health = HealthStub(probes)
    statuses = {name: (await health.Check(HealthCheckRequest(service=name))).status for name in ("", "live")}
    assert statuses == {"": NOT_SERVING, "live": SERVING}


async def test_health_port_reports_a_stop(server: Server, probes: grpc.aio.Channel) -> None:
    """Watchers on it are notified before the port closes."""
    watch = aiter(HealthStub(probes).Watch(HealthCheckRequest()))
    assert (await anext(watch)).status == SERVING

    await server.stop(grace=1)
    assert [answer.status async for answer in watch] == [NOT_SERVING]


class UnreadCall:
    """A call whose client never reads, so that no write completes."""

    def peer(self) -> str:
        """Return the address of its client."""
        return "ipv4:127.0.0.1:50052"

    async def write(self, message: HealthCheckResponse) -> None:  # noqa: ARG002
        """Wait forever."""
        await asyncio.Event().wait()


async def test_watcher_that_does_not_read_blocks_nothing(server: Server, probes: grpc.aio.Channel) -> None:
    """Neither other watchers nor a stop."""
    context: Any = UnreadCall()
    unread = asyncio.create_task(server.health.Watch(HealthCheckRequest(), context))
    watch = aiter(HealthStub(probes).Watch(HealthCheckRequest()))
    assert (await anext(watch)).status == SERVING

    async with asyncio.timeout(10):
        await server.stop(grace=1)
        assert [answer.status async for answer in watch] == [NOT_SERVING]
        await unread


async def test_invalid_message_is_refused_as_on_main_port(
    probes: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    """The log gets no traceback, with which strangers could fill it."""
    call: Any = probes.unary_unary("/grpc.health.v1.Health/Check")
    refused = await refusal(call(b"\xff\xff\xff"))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert caplog.records == []


async def test_taken_health_port_is_named(server: Server, sqlite_url: str) -> None:
    """The error names the setting."""
    with pytest.raises(OSError, match="ROSTER_HEALTH_LISTEN sets the address"):
        async with serve(sqlite_url, health_listen=server.health_address):
            pass
