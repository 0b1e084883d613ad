"""Reflection, which describes the contract, and the health service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from graphlib import TopologicalSorter
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from roster.errors import DatabaseUnavailable
from service import health
from service.db.engine import Database
from service.health import Health
from service.server import Server
from service.settings import Settings
from tests.support.errors import refusal
from tests.support.postgres import PostgresServer
from tests.support.server import serve

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
TIMEOUT_SECONDS = 20

SERVICES = [
    "roster.v1.UserService",
    "roster.v1.PostService",
    "roster.v1.BulkService",
    "roster.v1.ChangeService",
]
VERSIONS = ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"]

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
Ask = Callable[..., Any]


@pytest.fixture(params=VERSIONS)
def ask(request: pytest.FixtureRequest, channel: grpc.aio.Channel) -> Ask:
    """The reflection of the server: one question, one answer."""
    return asking(channel, request.param)


def asking(channel: grpc.aio.Channel, version: str) -> Ask:
    stub: Any = channel.stream_stream(
        f"/{version}/ServerReflectionInfo",
        request_serializer=ServerReflectionRequest.SerializeToString,
        response_deserializer=ServerReflectionResponse.FromString,
    )

    async def ask(**question: Any) -> ServerReflectionResponse:
        call = stub(iter([ServerReflectionRequest(**question)]), timeout=TIMEOUT_SECONDS)
        (answer,) = [answer async for answer in call]
        return answer

    return ask


def files(answer: ServerReflectionResponse) -> list[FileDescriptorProto]:
    found = answer.file_descriptor_response.file_descriptor_proto
    return [FileDescriptorProto.FromString(file) for file in found]


@on_sqlite
async def test_reflection_lists_every_service(ask: Ask) -> None:
    """Those of the contract, health, and both versions of reflection."""
    answer = await ask(list_services="")

    listed = [service.name for service in answer.list_services_response.service]
    assert sorted(listed) == sorted([*SERVICES, *VERSIONS, "grpc.health.v1.Health"])


@on_sqlite
async def test_reflection_finds_the_file_of_a_symbol(ask: Ask) -> None:
    """Of a service, method, message, enum, and error detail, which grpcurl prints."""
    expected = {
        "roster.v1.UserService": "roster/v1/users.proto",
        "roster.v1.UserService.GetUser": "roster/v1/users.proto",
        "roster.v1.PostService.BulkCreatePosts": "roster/v1/posts.proto",
        "roster.v1.User": "roster/v1/resources.proto",
        "roster.v1.User.View": "roster/v1/resources.proto",
        "roster.v1.BulkAck": "roster/v1/bulk.proto",
        "google.rpc.ErrorInfo": "google/rpc/error_details.proto",
        "google.rpc.BadRequest.FieldViolation": "google/rpc/error_details.proto",
        "grpc.health.v1.Health.Check": "grpc_health/v1/health.proto",
    }
    found = {symbol: files(await ask(file_containing_symbol=symbol)) for symbol in expected}

    assert {symbol: first.name for symbol, (first, *_) in found.items()} == expected


@on_sqlite
async def test_reflection_has_the_whole_contract(ask: Ask) -> None:
    """Clients can build every request from the files and their imports."""
    known: dict[str, FileDescriptorProto] = {}
    wanted = ["roster/v1/users.proto", "roster/v1/posts.proto", "roster/v1/changes.proto"]
    while wanted:
        for file in files(await ask(file_by_filename=wanted.pop())):
            known[file.name] = file
            wanted += [name for name in file.dependency if name not in known]

    pool = DescriptorPool()
    for name in TopologicalSorter({name: file.dependency for name, file in known.items()}).static_order():
        pool.AddSerializedFile(known[name].SerializeToString())

    for service in SERVICES:
        assert pool.FindServiceByName(service).methods


@on_sqlite
async def test_reflection_reports_unknown_symbols(ask: Ask) -> None:
    """The error is a response, so the stream continues."""
    unknown = [
        {"file_containing_symbol": "roster.v1.Nobody"},
        {"file_containing_symbol": ""},
        {"file_containing_symbol": "\0.é"},
        {"file_by_filename": "../../etc/passwd"},
        {"all_extension_numbers_of_type": "roster.v1.Nobody"},
    ]
    answers = [await ask(**question) for question in unknown]
    assert {answer.error_response.error_code for answer in answers} == {StatusCode.NOT_FOUND.value[0]}

    nothing_asked = await ask()
    assert nothing_asked.error_response.error_code == StatusCode.INVALID_ARGUMENT.value[0]


async def test_reflection_can_be_switched_off(sqlite_url: str) -> None:
    """Neither version is served, and all other services are."""
    async with serve_channel(sqlite_url, reflection=False) as channel:
        for version in VERSIONS:
            refused = await refusal(asking(channel, version)(list_services=""))
            assert refused.code == StatusCode.UNIMPLEMENTED

        assert await check(channel, "") == SERVING


@asynccontextmanager
async def serve_channel(database_url: str, **settings: Any) -> AsyncIterator[grpc.aio.Channel]:
    """Serve a database with some settings, and yield a channel to the server."""
    async with (
        serve(database_url, **settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield channel


async def check(channel: grpc.aio.Channel, service: str) -> int:
    return int((await HealthStub(channel).Check(HealthCheckRequest(service=service))).status)


async def statuses(channel: grpc.aio.Channel) -> dict[str, int]:
    listed = (await HealthStub(channel).List(HealthListRequest())).statuses
    return {name: answer.status for name, answer in listed.items()}


@pytest.mark.parametrize("service", ["", *SERVICES, "live"])
async def test_healthy_services_serve(channel: grpc.aio.Channel, service: str) -> None:
    """The server, each service, and the process."""
    assert await check(channel, service) == SERVING


@on_sqlite
async def test_health_lists_all_services(channel: grpc.aio.Channel) -> None:
    """Those that can be checked."""
    assert await statuses(channel) == dict.fromkeys(["", *SERVICES, "live"], SERVING)


@on_sqlite
async def test_health_of_an_unknown_service_is_not_found(channel: grpc.aio.Channel) -> None:
    """As in the health protocol; a watch is accepted, since the service may appear."""
    refused = await refusal(HealthStub(channel).Check(HealthCheckRequest(service="roster.v1.Nobody")))
    assert refused.code == StatusCode.NOT_FOUND

    watch = HealthStub(channel).Watch(HealthCheckRequest(service="roster.v1.Nobody"))
    assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN


@on_sqlite
async def test_stop_notifies_watchers_and_ends_them(server: Server) -> None:
    """Watches never end by themselves: a stop would wait for its whole grace."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = aiter(HealthStub(channel).Watch(HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING

        async with asyncio.timeout(TIMEOUT_SECONDS):
            await server.stop(grace=10 * TIMEOUT_SECONDS)

        assert [answer.status async for answer in watch] == [NOT_SERVING]


class FakeDatabase(Database):
    """A database whose answers the test sets."""

    is_away = False

    async def ping(self) -> None:
        if self.is_away:
            raise DatabaseUnavailable("the database can't be reached")
        await super().ping()


async def test_single_failed_check_is_not_reported(sqlite_url: str) -> None:
    """A short failover must not remove a server; two failed checks in a row do."""
    database = FakeDatabase(Settings(database_url=sqlite_url))
    health = Health(database, SERVICES)
    server = grpc.aio.server()
    add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for is_away, expected in [
            (True, SERVING),
            (True, NOT_SERVING),
            (True, NOT_SERVING),
            (False, SERVING),
            (True, SERVING),
        ]:
            database.is_away = is_away
            await health.check_database()
            assert await statuses(channel) == dict.fromkeys(["", *SERVICES], expected)
    await server.stop(grace=None)
    await database.close()


async def test_health_follows_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the server is not serving, but alive; then it serves again."""
    monkeypatch.setattr(health, "INTERVAL_SECONDS", 0.05)
    with PostgresServer() as postgres:
        async with postgres.database() as url, serve_channel(url) as channel:
            watch = HealthStub(channel).Watch(HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
            assert (await watch.read()).status == SERVING

            await asyncio.to_thread(postgres.stop)
            assert (await watch.read()).status == NOT_SERVING
            assert await check(channel, "") == NOT_SERVING
            assert await check(channel, "live") == SERVING

            await asyncio.to_thread(postgres.start)
            assert (await watch.read()).status == SERVING
            watch.cancel()
