"""A channel to Roster that balances calls over its servers, retries them, and raises domain errors."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar
from uuid import uuid4

import grpc
from google.protobuf.message import Message
from grpc.aio import (
    ClientCallDetails,
    UnaryStreamCall,
    UnaryStreamClientInterceptor,
    UnaryUnaryCall,
    UnaryUnaryClientInterceptor,
)

import roster.v1
from roster.client.address import check_address
from roster.client.consistency import Consistency, is_read, is_write, watch_bulk_methods
from roster.client.errors import DeadlineExceeded, error_from_call
from roster.errors import InvalidArgument, OutcomeUnknown, RosterError, Unavailable

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
UnaryContinuation = Callable[[ClientCallDetails, RequestT], Awaitable["UnaryUnaryCall[RequestT, ResponseT]"]]
StreamContinuation = Callable[
    [ClientCallDetails, RequestT], Awaitable["UnaryStreamCall[RequestT, ResponseT]"]
]

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


def channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    timeout: float = TIMEOUT_SECONDS,
    wait_for_ready: bool = True,
    server_name: str | None = None,
    consistency: Consistency | None = None,
) -> grpc.aio.Channel:
    """Return a channel to `host:port`, `dns:///name:port` or `unix:/path`, for the stubs of `roster.v1`.

    Raises ValueError for another address, such as a URL. The server's certificate must be for the host of the
    address, or for `server_name` if the address is that of a tunnel.

    If a name has several addresses, calls go to each in turn. `timeout`, in seconds, applies to unary calls
    without a timeout of their own; exports and bulk streams have no deadline. Writes get a `request_id`, so
    every unary call can be retried if its server goes away: up to 5 attempts.

    With `wait_for_ready`, calls wait for a server within their timeout. Without it, they fail at once if no
    server can be reached, and are not retried.

    If the server reads on replicas, reads see the writes that the channel has made before. `consistency` sets
    what else they must see, or that they accept any replica.

    Failed calls raise the domain errors of `roster.errors`. Bulk streams don't: use BulkLoader for them.
    Messages are limited to 16 MiB. Keepalive pings are sent every 30 s.
    """
    address = check_address(address)
    consistency = consistency or Consistency()
    unary = UnaryInterceptor(address, timeout, consistency, wait_for_ready=wait_for_ready)
    interceptors = [unary, ResponseStreamInterceptor(consistency, wait_for_ready=wait_for_ready)]
    options = [*OPTIONS, ("grpc.service_config", json.dumps(service_config(retry=wait_for_ready)))]
    if server_name:
        if not credentials:
            raise ValueError("server_name is the name in the server's certificate; it needs TLS credentials")
        # It also becomes the authority of the calls, by which a proxy finds the server.
        options.append(("grpc.ssl_target_name_override", server_name))
    if credentials:
        connection = grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)
    else:
        connection = grpc.aio.insecure_channel(address, options, interceptors=interceptors)
    unary.connection = connection
    watch_bulk_methods(connection, consistency)
    return connection


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


class UnaryInterceptor(UnaryUnaryClientInterceptor):
    """Gives each call a deadline, each write a `request_id`, each read a token; raises domain errors.

    A write with an unknown outcome is sent once more: its id ensures that it is applied once. If a write that
    failed may have been applied, the error has the id among its facts.
    """

    def __init__(
        self, address: str, timeout: float, consistency: Consistency, *, wait_for_ready: bool
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._consistency = consistency
        self._wait_for_ready = wait_for_ready
        self.connection: grpc.aio.Channel | None = None  # the channel, once it exists

    async def intercept_unary_unary(  # type: ignore[override]  # the channel carries only messages
        self,
        continuation: "UnaryContinuation[RequestT, ResponseT]",
        client_call_details: ClientCallDetails,
        request: RequestT,
    ) -> ResponseT:
        details = _with_defaults(client_call_details, self._timeout, wait_for_ready=self._wait_for_ready)
        repeatable = _with_request_id(request)
        if is_read(details.method):
            details = self._consistency.require(details)
        try:
            return await self._call(continuation, details, repeatable)
        except OutcomeUnknown:
            if not _request_id(repeatable):
                raise
            return await self._call(continuation, details, repeatable)

    async def _call(
        self,
        continuation: "UnaryContinuation[RequestT, ResponseT]",
        details: ClientCallDetails,
        request: RequestT,
    ) -> ResponseT:
        error: RosterError
        began, trailing_metadata = self._consistency.begin(), None
        may_have_written = is_write(details.method)
        try:
            call = await continuation(details, request)
            response = await call
            trailing_metadata = await call.trailing_metadata()
        except grpc.aio.AioRpcError as failure:
            error = error_from_call(failure)
            trailing_metadata = failure.trailing_metadata()
            may_have_written = may_have_written and not isinstance(error, InvalidArgument)
        else:
            return response
        finally:
            if may_have_written:
                self._consistency.end(trailing_metadata, began)
        if isinstance(error, DeadlineExceeded):
            error = DeadlineExceeded(self._describe_timeout(details.timeout))
        may_be_applied = isinstance(error, DeadlineExceeded | Unavailable | OutcomeUnknown)
        if may_be_applied and (request_id := _request_id(request)):
            error.facts["request_id"] = request_id
        raise error

    def _describe_timeout(self, seconds: float | None) -> str:
        state = self.connection.get_state() if self.connection else None
        if state is grpc.ChannelConnectivity.READY:
            return f"{self._address} did not answer within {seconds:g} s"
        return f"no server answers at {self._address}; waited {seconds:g} s for one"


class ResponseStreamInterceptor(UnaryStreamClientInterceptor):
    """Gives each export a token; raises domain errors from response streams."""

    def __init__(self, consistency: Consistency, *, wait_for_ready: bool) -> None:
        self._consistency = consistency
        self._wait_for_ready = wait_for_ready

    async def intercept_unary_stream(  # type: ignore[override]  # the channel carries only messages
        self,
        continuation: "StreamContinuation[RequestT, ResponseT]",
        client_call_details: ClientCallDetails,
        request: RequestT,
    ) -> AsyncGenerator[ResponseT, None]:
        details = _with_defaults(client_call_details, None, wait_for_ready=self._wait_for_ready)
        if is_read(details.method):
            details = self._consistency.require(details)
        return _responses(await continuation(details, request))


async def _responses(call: "UnaryStreamCall[RequestT, ResponseT]") -> AsyncGenerator[ResponseT, None]:
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error) from None
    finally:
        call.cancel()


def _with_defaults(
    details: ClientCallDetails, timeout: float | None, *, wait_for_ready: bool
) -> ClientCallDetails:
    """Return the details of a call, with defaults for those that the caller did not set."""
    if details.timeout is not None:
        timeout = details.timeout
    if details.wait_for_ready is not None:
        wait_for_ready = details.wait_for_ready
    return ClientCallDetails(details.method, timeout, details.metadata, details.credentials, wait_for_ready)


def _with_request_id(request: RequestT) -> RequestT:
    if "request_id" not in request.DESCRIPTOR.fields_by_name or _request_id(request):
        return request
    copied = type(request)(request_id=str(uuid4()))
    copied.MergeFrom(request)
    return copied


def _request_id(request: Message) -> str:
    return getattr(request, "request_id", "")
