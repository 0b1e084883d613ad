"""The port that has the health service alone, for probes that speak no TLS."""

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
from service.settings import Settings
from tests.support.errors import refusal
from tests.support.server import serve

FREE = "127.0.0.1:0"
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server(sqlite_url: str) -> AsyncIterator[Server]:
    """A server with a port for probes."""
    async with serve(sqlite_url, health_listen=FREE) as server:
        yield server


@pytest.fixture
async def probes(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to that port."""
    async with grpc.aio.insecure_channel(server.health_address) as channel:
        yield channel


@pytest.mark.parametrize("service", ["", "roster.v1.UserService", "live"])
async def test_the_health_port_answers_probes(probes: grpc.aio.Channel, service: str) -> None:
    """Readiness of all and of one service, and liveness, as on the main port."""
    assert (await HealthStub(probes).Check(HealthCheckRequest(service=service))).status == SERVING


async def test_the_health_port_has_nothing_else(probes: grpc.aio.Channel) -> None:
    """Whoever finds it open reaches no data."""
    refused = await refusal(UserServiceStub(probes).GetUser(GetUserRequest(id=1)))
    assert refused.code == grpc.StatusCode.UNIMPLEMENTED


async def test_a_database_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in a row it has not answered in time: one that is frozen refuses no connection either."""
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


async def test_a_server_that_stops_is_alive(server: Server, probes: grpc.aio.Channel) -> None:
    """It takes no more calls, but whoever restarted it would cut off those in hand."""
    await server.health.enter_graceful_shutdown()

    health = HealthStub(probes)
    statuses = {name: (await health.Check(HealthCheckRequest(service=name))).status for name in ("", "live")}
    assert statuses == {"": NOT_SERVING, "live": SERVING}


async def test_the_health_port_tells_of_a_stop(server: Server, probes: grpc.aio.Channel) -> None:
    """A watcher hears it there too, before the port closes."""
    watch = aiter(HealthStub(probes).Watch(HealthCheckRequest()))
    assert (await anext(watch)).status == SERVING

    await server.stop(grace=1)
    assert [answer.status async for answer in watch] == [NOT_SERVING]


class Unread:
    """A call whose client never reads: what is written to it does not get out."""

    def peer(self) -> str:
        """Return the address of its client."""
        return "ipv4:127.0.0.1:50052"

    async def write(self, message: HealthCheckResponse) -> None:  # noqa: ARG002
        """Wait for room."""
        await asyncio.Event().wait()


async def test_a_watcher_that_does_not_read_holds_nobody_up(server: Server, probes: grpc.aio.Channel) -> None:
    """Neither the others, nor a stop."""
    context: Any = Unread()
    unread = asyncio.create_task(server.health.Watch(HealthCheckRequest(), context))
    watch = aiter(HealthStub(probes).Watch(HealthCheckRequest()))
    assert (await anext(watch)).status == SERVING

    async with asyncio.timeout(10):
        await server.stop(grace=1)
        assert [answer.status async for answer in watch] == [NOT_SERVING]
        await unread


async def test_bytes_that_are_no_message_are_answered_as_on_the_other_port(
    probes: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a traceback in the log, which anybody who finds the port could fill."""
    call: Any = probes.unary_unary("/grpc.health.v1.Health/Check")
    refused = await refusal(call(b"\xff\xff\xff"))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert caplog.records == []


async def test_a_health_port_that_is_taken_is_named(server: Server, sqlite_url: str) -> None:
    """The message says which setting it was."""
    taken = Settings(database_url=sqlite_url, listen=FREE, health_listen=server.health_address)
    second = Server(taken)
    with pytest.raises(OSError, match="ROSTER_HEALTH_LISTEN sets the address"):
        await second.start()
    await second.database.close()
