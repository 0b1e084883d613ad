"""A channel to Roster that balances calls over its servers, retries them, and raises domain errors."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc.aio import (
    ClientCallDetails,
    UnaryStreamCall,
    UnaryStreamClientInterceptor,
    UnaryUnaryCall,
    UnaryUnaryClientInterceptor,
)

from roster.client.address import check_address
from roster.client.calls import (
    PROBE,
    PROBE_METHOD,
    PROBE_SECONDS,
    TIMEOUT_SECONDS,
    channel_options,
    error_of_timeout,
    error_of_unary,
    is_probe,
    request_id_of,
    rest_of,
    with_request_id,
)
from roster.client.consistency import Consistency, is_read, is_write, watch_bulk_methods
from roster.client.errors import DeadlineExceeded, error_from_call
from roster.errors import InvalidArgument, OutcomeUnknown, RosterError

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
UnaryContinuation = Callable[[ClientCallDetails, RequestT], Awaitable["UnaryUnaryCall[RequestT, ResponseT]"]]
StreamContinuation = Callable[
    [ClientCallDetails, RequestT], Awaitable["UnaryStreamCall[RequestT, ResponseT]"]
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
    server can be reached, and are not retried. Exports without a timeout never wait, but are retried.

    If the server reads on replicas, reads see the writes that the channel has made before. `consistency` sets
    what else they must see, or that they accept any replica.

    Failed calls raise the domain errors of `roster.errors`. Bulk streams don't: use BulkLoader for them.
    Messages are limited to 16 MiB. Keepalive pings are sent every 30 s.
    """
    address = check_address(address)
    consistency = consistency or Consistency()
    unary = UnaryInterceptor(address, timeout, consistency, wait_for_ready=wait_for_ready)
    interceptors = [unary, ResponseStreamInterceptor(address, consistency, wait_for_ready=wait_for_ready)]
    options = channel_options(credentials, server_name, retry=wait_for_ready)
    if credentials:
        connection = grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)
    else:
        connection = grpc.aio.insecure_channel(address, options, interceptors=interceptors)
    unary.connection = connection
    watch_bulk_methods(connection, consistency)
    return connection


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
    ) -> "UnaryUnaryCall[RequestT, ResponseT]":
        details = _with_defaults(client_call_details, self._timeout, wait_for_ready=self._wait_for_ready)
        repeatable = with_request_id(request)
        if is_read(details.method):
            details = self._consistency.require(details)
        began = time.monotonic()
        try:
            return await self._call(continuation, details, repeatable)
        except OutcomeUnknown:
            if not request_id_of(repeatable):
                raise
            rest = _with_timeout(details, rest_of(details.timeout, began))
            return await self._call(continuation, rest, repeatable)

    async def _call(
        self,
        continuation: "UnaryContinuation[RequestT, ResponseT]",
        details: ClientCallDetails,
        request: RequestT,
    ) -> "UnaryUnaryCall[RequestT, ResponseT]":
        """Return a call that has succeeded, and not only its response: the caller may want the metadata."""
        began, trailing_metadata = self._consistency.begin(), None
        may_have_written = is_write(details.method)
        try:
            call = await continuation(details, request)
            await call
            trailing_metadata = await call.trailing_metadata()
        except grpc.aio.AioRpcError as failure:
            error = error_of_unary(failure, request, self._address)
            trailing_metadata = failure.trailing_metadata()
            may_have_written = may_have_written and not isinstance(error, InvalidArgument)
        else:
            return call
        finally:
            if may_have_written:
                self._consistency.end(trailing_metadata, began)
        if isinstance(error, DeadlineExceeded) and not is_probe(details.method):
            error = error_of_timeout(error, self._address, details.timeout, await self._probe())
        raise error

    async def _probe(self) -> RosterError | None:
        """Return the error of a call that does not wait for a server, None if the channel is connected."""
        if not self.connection or self.connection.get_state() is grpc.ChannelConnectivity.READY:
            return None
        check: Any = self.connection.unary_unary(PROBE_METHOD, **PROBE)
        try:
            await check(Empty(), timeout=PROBE_SECONDS, wait_for_ready=False)
        except RosterError as error:
            return error
        return None


class ResponseStreamInterceptor(UnaryStreamClientInterceptor):
    """Gives each export a token; raises domain errors from response streams.

    A call without a deadline does not wait for a server, which may never come.
    """

    def __init__(self, address: str, consistency: Consistency, *, wait_for_ready: bool) -> None:
        self._address = address
        self._consistency = consistency
        self._wait_for_ready = wait_for_ready

    async def intercept_unary_stream(  # type: ignore[override]  # the channel carries only messages
        self,
        continuation: "StreamContinuation[RequestT, ResponseT]",
        client_call_details: ClientCallDetails,
        request: RequestT,
    ) -> AsyncGenerator[ResponseT, None]:
        may_wait = self._wait_for_ready and client_call_details.timeout is not None
        details = _with_defaults(client_call_details, None, wait_for_ready=may_wait)
        if is_read(details.method):
            details = self._consistency.require(details)
        return _responses(await continuation(details, request), self._address)


async def _responses(
    call: "UnaryStreamCall[RequestT, ResponseT]", address: str
) -> AsyncGenerator[ResponseT, None]:
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error, address) from None
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


def _with_timeout(details: ClientCallDetails, timeout: float | None) -> ClientCallDetails:
    return ClientCallDetails(
        details.method, timeout, details.metadata, details.credentials, details.wait_for_ready
    )
