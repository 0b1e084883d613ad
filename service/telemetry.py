"""OpenTelemetry's environment variables, as far as they decide whether there are traces.

The functions are given the environment, which only `service.settings` reads.
An empty variable counts as unset, and white space around a value does not count.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from collections.abc import Mapping
from urllib.parse import urlsplit

TRACES, ALL_SIGNALS = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
EXPORTER = "OTEL_TRACES_EXPORTER"
GRPC, HTTP = "grpc", "http/protobuf"


def is_wanted(variables: Mapping[str, str]) -> bool:
    """Return whether traces are to be sent: there is an endpoint, and nothing disables them."""
    is_disabled = _value(variables, "OTEL_SDK_DISABLED").lower() == "true" or _exporters(variables) == [
        "none"
    ]
    return bool(_endpoint(variables)) and not is_disabled


def protocol(variables: Mapping[str, str]) -> str:
    """Return the protocol for sending traces, `grpc` or `http/protobuf`."""
    return _value(variables, f"{TRACES}PROTOCOL") or _value(variables, f"{ALL_SIGNALS}PROTOCOL") or HTTP


def check(variables: Mapping[str, str]) -> None:
    """Raise ValueError for variables with which no trace would arrive."""
    if unknown := set(_exporters(variables)) - {"otlp"}:
        raise ValueError(f"{EXPORTER} names {', '.join(sorted(unknown))}; Roster supports otlp and none")
    transport, endpoint = protocol(variables), _endpoint(variables)
    if transport not in (GRPC, HTTP):
        raise ValueError(f"{ALL_SIGNALS}PROTOCOL is {transport}; Roster has {GRPC} and {HTTP}")
    # gRPC also accepts a target without a scheme.
    if "://" not in endpoint and transport == GRPC:
        endpoint = f"http://{endpoint}"
    try:
        url = urlsplit(endpoint)
        is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{ALL_SIGNALS}ENDPOINT is not a URL such as http://collector:4318")


def _endpoint(variables: Mapping[str, str]) -> str:
    return _value(variables, f"{TRACES}ENDPOINT") or _value(variables, f"{ALL_SIGNALS}ENDPOINT")


def _exporters(variables: Mapping[str, str]) -> list[str]:
    return [name.strip().lower() for name in _value(variables, EXPORTER).split(",") if name.strip()]


def _value(variables: Mapping[str, str], name: str) -> str:
    return variables.get(name, "").strip()
