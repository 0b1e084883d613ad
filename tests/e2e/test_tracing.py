"""Traces: spans of calls and their statements in the caller's trace, sent to a collector."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, ExportUsersRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub
from service import telemetry
from service.interceptors import tracing
from service.server import Server
from tests.support.command import ROSTER, SERVER_DEFAULTS, start
from tests.support.errors import refusal
from tests.support.server import serve

TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
CALLER = [("traceparent", f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01")]
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Collects the spans of servers that start after it."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setattr(tracing, "exporting_provider", lambda _: provider)
    return exporter


@pytest.fixture
async def server(exporter: InMemorySpanExporter, database_url: str) -> AsyncIterator[Server]:
    """A server that makes traces."""
    async with serve(database_url) as server:
        yield server


async def spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """Return the spans of the first call that ends; its own span is the last."""
    while not any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()):
        await asyncio.to_thread(exporter.force_flush)  # the span of a failed call ends after its status
    return list(exporter.get_finished_spans())


def names(of: list[ReadableSpan]) -> list[str]:
    return [span.name for span in of]


async def test_call_is_a_span_in_its_callers_trace(
    exporter: InMemorySpanExporter, users: UserServiceAsyncStub
) -> None:
    """It has method and code; its statements are child spans."""
    await refusal(users.GetUser(GetUserRequest(id=99), metadata=CALLER))

    *statements, call = await spans(exporter)
    assert call.name == "roster.v1.UserService/GetUser"
    assert call.context
    assert call.parent
    assert call.attributes
    assert (call.context.trace_id, call.parent.span_id) == (TRACE_ID, PARENT_ID)
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert call.status.status_code is StatusCode.UNSET  # the caller's fault
    assert names(statements) == ["SELECT"]
    for statement in statements:
        assert statement.parent == call.context
        assert (call.start_time or 0) <= (statement.start_time or 0) <= (statement.end_time or 0)


async def test_stream_span_has_the_statements_of_all_batches(
    exporter: InMemorySpanExporter, users: UserServiceAsyncStub
) -> None:
    """Including COPY, although batches run in their own tasks."""
    messages = [BulkCreateUsersRequest(users=[User(email=f"user{n}@example.org")]) for n in range(2)]
    async for _ in users.BulkCreateUsers(iter(messages), metadata=CALLER):
        pass

    *statements, call = await spans(exporter)
    assert call.name == "roster.v1.UserService/BulkCreateUsers"
    assert all(statement.parent == call.context for statement in statements)
    writes = [name for name in names(statements) if name in ("COPY", "INSERT")]
    assert len(writes) == len(messages)


@on_sqlite
async def test_export_is_a_span(exporter: InMemorySpanExporter, users: UserServiceAsyncStub) -> None:
    """A new trace begins if the caller has none."""
    async for _ in users.ExportUsers(ExportUsersRequest()):
        pass

    *_, call = await spans(exporter)
    assert (call.name, call.parent) == ("roster.v1.UserService/ExportUsers", None)


@on_sqlite
async def test_internal_error_marks_the_span(
    exporter: InMemorySpanExporter, server: Server, users: UserServiceAsyncStub
) -> None:
    """Without the exception, which is in the log."""
    await server.database.close()
    server.database.begin = server.database.rows = None  # type: ignore[method-assign, assignment]
    await refusal(users.GetUser(GetUserRequest(id=1)))

    *_, call = await spans(exporter)
    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, "INTERNAL")
    assert not call.events


class Collector(TraceServiceServicer):
    """An OTLP collector that keeps what it receives."""

    def __init__(self) -> None:
        self.received: Queue[ExportTraceServiceRequest] = Queue()

    async def Export(  # noqa: N802
        self,
        request: ExportTraceServiceRequest,
        _: object,
    ) -> ExportTraceServiceResponse:
        self.received.put(request)
        return ExportTraceServiceResponse()

    @contextmanager
    def over_http(self) -> Iterator[int]:
        """Listen, and yield the port."""
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.put(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            Thread(target=server.serve_forever).start()
            yield server.server_port
            server.shutdown()


async def call_once(database_url: str) -> None:
    """Start a server, call it, and stop it."""
    async with serve(database_url) as server, grpc.aio.insecure_channel(server.address) as channel:
        await refusal(UserServiceStub(channel).GetUser(GetUserRequest(id=1), metadata=CALLER))


def check(request: ExportTraceServiceRequest) -> None:
    (resource,) = request.resource_spans
    attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    sent = [span for scope in resource.scope_spans for span in scope.spans]
    assert attributes["service.name"] == "roster"
    assert [span.name for span in sent] == ["SELECT", "roster.v1.UserService/GetUser"]
    assert {span.trace_id for span in sent} == {TRACE_ID.to_bytes(16)}


async def test_spans_reach_a_collector_over_http(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All spans arrive before the server has stopped."""
    collector = Collector()
    with collector.over_http() as port:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        await call_once(sqlite_url)
    check(collector.received.get_nowait())


async def test_spans_reach_a_collector_over_grpc(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's variable selects the protocol."""
    collector, server = Collector(), grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    await call_once(sqlite_url)
    await server.stop(None)
    check(collector.received.get_nowait())


async def test_unresponsive_collector_does_not_delay_a_stop(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remaining spans are lost."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with asyncio.timeout(20):
            await call_once(sqlite_url)


def test_imports_no_telemetry_without_an_endpoint() -> None:
    """Servers without traces do not pay for them."""
    look = "import sys, service.server; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    imported = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, check=True)
    assert imported.stdout.decode().strip() == "[]"


async def test_endpoint_without_the_extra_is_reported(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server starts without traces."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "service.interceptors.tracing", None)
    with caplog.at_level(logging.WARNING):
        await call_once(sqlite_url)
    assert "install the extra `tracing`" in caplog.text


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
BROKEN = {
    "OTEL_PROPAGATORS": "b3",
    "OTEL_TRACES_EXPORTER": "zipkin",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://[::1",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "-1",
    "OTEL_BSP_SCHEDULE_DELAY": "-1",
}
DISABLED = {"OTEL_TRACES_EXPORTER": " none", "OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": " "}
HARMLESS = {"OTEL_PROPAGATORS": "", "OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": ""}


@pytest.mark.parametrize("name", BROKEN)
async def test_server_serves_without_traces_that_can_t_work(name: str, tmp_path: Path) -> None:
    """OpenTelemetry raises for some of these when it is imported, and for others only when it sends."""
    process = await start(
        ROSTER, "serve", folder=tmp_path, **SERVER_DEFAULTS, **ENDPOINT | {name: BROKEN[name]}
    )
    lines = []
    assert process.stderr
    async for line in process.stderr:
        lines.append(line.decode())
        if line.startswith(b"listening on "):
            process.terminate()

    assert await process.wait() == 0
    (warning,) = (json.loads(line) for line in lines if '"WARNING"' in line)
    assert warning["message"].startswith("traces are not sent: ")
    assert warning["message"].endswith("; correct the OTEL_ variables")
    assert "Traceback" not in "".join(lines)


async def test_a_malformed_header_is_reported_without_its_value(tmp_path: Path) -> None:
    """It usually is the key of a vendor."""
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "api-key: xyzzy, other key"}
    process = await start(ROSTER, "serve", folder=tmp_path, **SERVER_DEFAULTS, **ENDPOINT, **headers)
    assert process.stderr
    lines = []
    async for line in process.stderr:
        lines.append(line.decode())
        if line.startswith(b"listening on "):
            process.terminate()

    assert await process.wait() == 0
    assert "Header format invalid!" in "".join(lines)
    assert "xyzzy" not in "".join(lines)
    assert "other key" not in "".join(lines)


@pytest.mark.parametrize("name", DISABLED)
def test_traces_can_be_disabled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the specification's variables; then the code for traces is not imported."""
    for variable, value in (ENDPOINT | {name: DISABLED[name]}).items():
        monkeypatch.setenv(variable, value)

    assert not telemetry.is_wanted(os.environ)


@pytest.mark.parametrize("name", HARMLESS)
def test_traces_are_wanted_with_an_endpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty variables count as unset."""
    for variable, value in (ENDPOINT | {name: HARMLESS[name]}).items():
        monkeypatch.setenv(variable, value)
    telemetry.check(os.environ)

    assert telemetry.is_wanted(os.environ)
    assert telemetry.protocol(os.environ) == "http/protobuf"


def test_collector_of_grpc_needs_no_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of gRPC have none."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    telemetry.check(os.environ)
    assert telemetry.is_wanted(os.environ)


async def test_disabled_exporter_receives_nothing(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector listens, and calls are made."""
    collector = Collector()
    with collector.over_http() as port:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        await call_once(sqlite_url)
    assert collector.received.empty()
