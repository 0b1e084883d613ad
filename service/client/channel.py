"""One channel to Roster: it spreads calls over the servers, retries them, and raises domain errors."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any
from uuid import uuid4

import grpc
from grpc.aio import ClientCallDetails, UnaryStreamClientInterceptor, UnaryUnaryClientInterceptor

from roster.v1 import bulk_pb2, posts_pb2, users_pb2
from service.client.errors import DeadlineExceeded, error_from_call
from service.errors import OutcomeUnknown, Unavailable

TIMEOUT_SECONDS = 10.0
RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    # CANCELLED by the server, which is about to stop: calls that it has accepted and not begun.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
OPTIONS = [
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_receive_message_length", 16 << 20),
    # The server allows a ping every 20 s, also between calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a channel waits up to 2 minutes before it looks for a server that was away, and 30 s
    # before it asks for the addresses again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Otherwise the environment's http_proxy gets even the calls to this machine.
    ("grpc.enable_http_proxy", 0),
]


def channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    timeout: float = TIMEOUT_SECONDS,
    is_patient: bool = True,
) -> grpc.aio.Channel:
    """Return a channel to `host:port`, `dns:///name:port` or `unix:/path`, for the stubs of `roster.v1`.

    A name with several addresses gets the calls in turn. A call without a timeout has `timeout` seconds, but
    for exports and bulk streams, which have no end. Writes get a `request_id`, so that every unary call can
    be tried again, 5 times at most, when a server is away; a patient channel waits, within the timeout, for
    one to be there. Failed calls raise the domain errors of `service.errors`, but for bulk streams, which
    are for BulkLoader. Messages have up to 16 MiB; keepalive is every 30 s.
    """
    interceptors = [Calls(address, timeout, is_patient=is_patient), Streams(is_patient=is_patient)]
    options = [*OPTIONS, ("grpc.service_config", json.dumps(service_config(retries=is_patient)))]
    if credentials:
        return grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)
    return grpc.aio.insecure_channel(address, options, interceptors=interceptors)


def service_config(*, retries: bool) -> dict[str, Any]:
    """Return https://grpc.io/docs/guides/service-config/: in turn, and what is tried again."""
    services = [
        service
        for file in (users_pb2, posts_pb2, bulk_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    # A stream of requests is never tried again behind its sender's back.
    repeatable = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if not method.client_streaming
    ]
    methods = [{"name": repeatable, "retryPolicy": RETRIES}] if retries else []
    return {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": methods}


class Calls(UnaryUnaryClientInterceptor):
    """Gives each call a deadline, and each write a `request_id`; raises domain errors.

    A write whose outcome the server doesn't know is sent once more: by its id it happens once. Where it may
    have happened, the error has the id among its facts.
    """

    def __init__(self, address: str, timeout: float, *, is_patient: bool) -> None:
        self._address = address
        self._timeout = timeout
        self._is_patient = is_patient

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        asked = client_call_details
        details = ClientCallDetails(
            asked.method,
            self._timeout if asked.timeout is None else asked.timeout,
            asked.metadata,
            asked.credentials,
            self._is_patient if asked.wait_for_ready is None else asked.wait_for_ready,
        )
        repeatable = _repeatable(request)
        try:
            return await self._answer(continuation, details, repeatable)
        except OutcomeUnknown:
            if not getattr(repeatable, "request_id", ""):
                raise
            return await self._answer(continuation, details, repeatable)

    async def _answer(
        self, continuation: Callable[..., Any], details: ClientCallDetails, request: Any
    ) -> Any:
        try:
            return await (await continuation(details, request))
        except grpc.aio.AioRpcError as failed:
            error = error_from_call(failed)
        if isinstance(error, DeadlineExceeded):
            error = DeadlineExceeded(f"{self._address} did not answer in {details.timeout:g} s")
        is_open = isinstance(error, DeadlineExceeded | Unavailable | OutcomeUnknown)
        if is_open and (request_id := getattr(request, "request_id", "")):
            error.facts["request_id"] = request_id
        raise error


class Streams(UnaryStreamClientInterceptor):
    """Raises domain errors for what a stream of answers ends with."""

    def __init__(self, *, is_patient: bool) -> None:
        self._is_patient = is_patient

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        asked = client_call_details
        waits = self._is_patient if asked.wait_for_ready is None else asked.wait_for_ready
        details = ClientCallDetails(asked.method, asked.timeout, asked.metadata, asked.credentials, waits)
        return _answers(await continuation(details, request))


async def _answers(call: Any) -> AsyncGenerator[Any]:
    try:
        async for answer in call:
            yield answer
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error) from None
    finally:
        call.cancel()


def _repeatable(request: Any) -> Any:
    if "request_id" not in request.DESCRIPTOR.fields_by_name or request.request_id:
        return request
    copied = type(request)()
    copied.CopyFrom(request)
    copied.request_id = str(uuid4())
    return copied
