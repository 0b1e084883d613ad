"""OpenTelemetry's environment variables, as far as they decide whether there are traces.

An empty variable counts as unset, and white space around a value does not count.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import os
from urllib.parse import urlsplit

TRACES, ALL_SIGNALS = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
EXPORTER = "OTEL_TRACES_EXPORTER"
GRPC, HTTP = "grpc", "http/protobuf"


def is_wanted() -> bool:
    """Return whether traces are to be sent: there is an endpoint, and nothing disables them."""
    is_disabled = _value("OTEL_SDK_DISABLED").lower() == "true" or _exporters() == ["none"]
    return bool(_endpoint()) and not is_disabled


def protocol() -> str:
    """Return the protocol for sending traces, `grpc` or `http/protobuf`."""
    return _value(f"{TRACES}PROTOCOL") or _value(f"{ALL_SIGNALS}PROTOCOL") or HTTP


def check() -> None:
    """Raise ValueError for variables with which no trace would arrive."""
    if unknown := set(_exporters()) - {"otlp"}:
        raise ValueError(f"{EXPORTER} names {', '.join(sorted(unknown))}; Roster has otlp, and none")
    if protocol() not in (GRPC, HTTP):
        raise ValueError(f"{ALL_SIGNALS}PROTOCOL is {protocol()}; Roster has {GRPC} and {HTTP}")
    # gRPC also accepts a target without a scheme.
    endpoint = _endpoint() if "://" in _endpoint() or protocol() == HTTP else f"http://{_endpoint()}"
    try:
        url = urlsplit(endpoint)
        is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{ALL_SIGNALS}ENDPOINT is not a URL such as http://collector:4318")


def _endpoint() -> str:
    return _value(f"{TRACES}ENDPOINT") or _value(f"{ALL_SIGNALS}ENDPOINT")


def _exporters() -> list[str]:
    return [name.strip().lower() for name in _value(EXPORTER).split(",") if name.strip()]


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()
