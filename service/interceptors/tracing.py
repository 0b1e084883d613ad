"""OpenTelemetry traces, if the extra `tracing` is installed and an endpoint is set.

There is a span for each call and for each of its statements. OpenTelemetry's own environment variables
configure everything: endpoint, protocol, headers, sampler, service name.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from importlib import import_module
from time import time_ns

import grpc
from opentelemetry import propagate
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id

from service.db.statements import LISTENERS
from service.interceptors.chain import Context, Proceed, Request, Response, Rpc, code_at_end
from service.logs import CALL_IDS

MAX_STATEMENT = 2000
# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
SERVER_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


def exporting_provider(protocol: str) -> TracerProvider:
    """Return a provider that sends spans to an OTLP collector, by `grpc` or by `http/protobuf`."""
    resource = Resource.create({"service.name": "roster", **OTELResourceDetector().detect().attributes})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # see `Tracing.close`
    transport = "grpc" if protocol == "grpc" else "http"
    exporters = import_module(f"opentelemetry.exporter.otlp.proto.{transport}.trace_exporter")
    provider.add_span_processor(BatchSpanProcessor(exporters.OTLPSpanExporter()))
    return provider


class Tracing:
    """Creates a span for each call, a child of the caller's, and a child span for each of its statements."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("roster")

    def close(self) -> None:
        """Send the remaining spans; this may take seconds."""
        self._provider.shutdown()

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Trace the calls of an RPC."""
        attributes = {"rpc.system": "grpc", "rpc.service": rpc.service, "rpc.method": rpc.name}

        async def trace(request: Request, context: Context) -> Response:
            with self._tracer.start_as_current_span(
                f"{rpc.service}/{rpc.name}",
                propagate.extract(dict(context.invocation_metadata() or ())),
                SpanKind.SERVER,
                attributes,
                record_exception=False,
                set_status_on_exception=False,
            ) as span:
                CALL_IDS.set({"trace_id": format_trace_id(span.get_span_context().trace_id)})
                LISTENERS.set((self._add_statement,))
                try:
                    return await proceed(request, context)
                finally:
                    _set_code(span, code_at_end(context))

        return trace

    def _add_statement(self, statement: str, seconds: float) -> None:
        now = time_ns()
        self._tracer.start_span(
            statement.partition(" ")[0],
            kind=SpanKind.CLIENT,
            attributes={"db.query.text": statement[:MAX_STATEMENT]},  # without values, which are parameters
            start_time=now - int(seconds * 1e9),
        ).end(now)


def _set_code(span: Span, code: grpc.StatusCode) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code in SERVER_FAULTS:
        span.set_status(StatusCode.ERROR, code.name)
