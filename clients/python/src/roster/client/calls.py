"""The part of calls that async and blocking channels share: options, defaults, and the errors of calls."""

import json
import time
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar
from uuid import uuid4

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

import roster.v1
from roster.client.causes import no_server
from roster.client.errors import DeadlineExceeded, Disconnected, FailedCall, ProxyUnavailable, error_from_call
from roster.errors import OutcomeUnknown, RosterError, Unavailable

RequestT = TypeVar("RequestT", bound=Message)

# The generated modules of the contract's files.
CONTRACT = [
    import_module(f"roster.v1.{module.name}")
    for module in iter_modules(roster.v1.__path__)
    if module.name.endswith("_pb2")
]
TIMEOUT_SECONDS = 10.0
RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    # A server that is stopping cancels the calls that it has accepted but not started.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
OPTIONS = [
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_receive_message_length", 16 << 20),
    # The server allows one ping every 5 s, between calls too.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a channel waits up to 2 minutes before it reconnects to a server that was away, and 30 s
    # before it resolves the name again. Clients go on when the channel is connected, so this is short.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # By default gRPC would send even calls to this machine through the http_proxy of the environment.
    ("grpc.enable_http_proxy", 0),
]
# A call that has timed out asks this for the reason; the answer does not matter.
PROBE_METHOD = "/grpc.health.v1.Health/Check"
PROBE_SECONDS = 0.1
PROBE: dict[str, Any] = {
    "request_serializer": Empty.SerializeToString,
    "response_deserializer": Empty.FromString,
}


def channel_options(
    credentials: grpc.ChannelCredentials | None, server_name: str | None, *, retry: bool
) -> list[tuple[str, Any]]:
    """Return the options of a channel; raises ValueError for a server name without credentials."""
    options: list[tuple[str, Any]] = [
        *OPTIONS,
        ("grpc.service_config", json.dumps(service_config(retry=retry))),
    ]
    if server_name:
        if not credentials:
            raise ValueError("server_name is the name in the server's certificate; it needs TLS credentials")
        # It also becomes the authority of the calls, by which a proxy finds the server.
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def service_config(*, retry: bool) -> dict[str, Any]:
    """Return a gRPC service config (https://grpc.io/docs/guides/service-config/): balancing and retries."""
    retries = [{"name": _retryable_methods(), "retryPolicy": RETRY_POLICY}] if retry else []
    return {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": retries}


def _retryable_methods() -> list[dict[str, str]]:
    # Request streams are left out: gRPC would buffer and repeat messages without the sender's knowledge.
    return [
        {"service": service.full_name, "method": method.name}
        for file in CONTRACT
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if not method.client_streaming
    ]


def with_request_id(request: RequestT) -> RequestT:
    """Return the request of a call; that of a write gets a `request_id`, unless it has one."""
    if "request_id" not in request.DESCRIPTOR.fields_by_name or request_id_of(request):
        return request
    copied = type(request)(request_id=str(uuid4()))
    copied.MergeFrom(request)
    return copied


def is_probe(method: str | bytes) -> bool:
    """Return whether a method is PROBE_METHOD."""
    return method in {PROBE_METHOD, PROBE_METHOD.encode()}


def request_id_of(request: Message) -> str:
    """Return the `request_id` of a request, "" if it has none."""
    return getattr(request, "request_id", "")


def rest_of(timeout: float | None, began: float) -> float | None:
    """Return the seconds that are left for the second attempt of a call, which began at a monotonic time."""
    return None if timeout is None else max(0, round(timeout - (time.monotonic() - began), 3))


def error_of_unary(failure: FailedCall, request: Message, address: str) -> RosterError:
    """Return the domain error of a unary call; if a write may have been applied, its facts have the id."""
    error = error_from_call(failure, address)
    if isinstance(error, (DeadlineExceeded, Unavailable, OutcomeUnknown)) and request_id_of(request):
        error.facts["request_id"] = request_id_of(request)
    return error


def error_of_timeout(
    timeout: RosterError, address: str, seconds: float | None, state: RosterError | None
) -> DeadlineExceeded:
    """Return the error of a call that has timed out, with its message.

    `state` is the error of a call that did not wait for a server; None if the channel is connected.
    """
    if isinstance(state, Disconnected) and not isinstance(state, ProxyUnavailable):
        message = f"{state.message}; waited {seconds:g} s for one"
    elif isinstance(state, DeadlineExceeded):  # the connection is still being made
        message = f"{no_server(address)}; waited {seconds:g} s for one"
    else:
        message = f"{address} did not answer within {seconds:g} s"
    error = DeadlineExceeded(message)
    error.facts = timeout.facts
    return error
