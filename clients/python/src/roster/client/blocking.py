"""The client without asyncio, for scripts and WSGI applications: a channel, and the pages of lists.

It is made of gRPC's own synchronous stubs, and may be used by several threads. A process that forks, such as
the master of gunicorn with `preload_app`, must open its channels after the fork, in each worker.

Loads and watches, which never stop to wait for one answer, are in the asynchronous part: BulkLoader and
watch_changes. A script runs them with asyncio.run.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from typing_extensions import Self

from roster.client.address import check_address
from roster.client.calls import (
    PROBE,
    PROBE_METHOD,
    PROBE_SECONDS,
    TIMEOUT_SECONDS,
    channel_options,
    error_of_timeout,
    error_of_unary,
    request_id_of,
    rest_of,
    with_request_id,
)
from roster.client.consistency import Consistency, is_read, is_write
from roster.client.errors import DeadlineExceeded, error_from_call
from roster.client.pages import next_request, rows_of
from roster.errors import InvalidArgument, OutcomeUnknown, RosterError

RequestT = TypeVar("RequestT", bound=Message)


def channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    timeout: float = TIMEOUT_SECONDS,
    wait_for_ready: bool = True,
    server_name: str | None = None,
    consistency: Consistency | None = None,
) -> grpc.Channel:
    """Return a channel for the stubs of `roster.v1`; its parameters and errors are those of `client.channel`.

    Calls that a stub makes with `.future` raise grpc.RpcError, not the domain errors. If you leave the
    iteration of a response stream early, cancel the call.
    """
    address = check_address(address)
    options = channel_options(credentials, server_name, retry=wait_for_ready)
    if credentials:
        connection = grpc.secure_channel(address, credentials, options)
    else:
        connection = grpc.insecure_channel(address, options)
    interceptor = Interceptor(
        connection, address, timeout, consistency or Consistency(), wait_for_ready=wait_for_ready
    )
    return grpc.intercept_channel(connection, interceptor)


def pages(method: Callable[[RequestT], Message], request: RequestT) -> Generator[Any, None, None]:
    """Yield the rows of every page of a List RPC, fetching pages on demand; raises RosterError."""
    page_request: RequestT | None = request
    while page_request:
        page = method(page_request)
        yield from rows_of(page)
        page_request = next_request(page_request, page)


@dataclass(frozen=True)
class Details(grpc.ClientCallDetails):
    """The details of a call, as gRPC passes them to an interceptor."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class Interceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Gives each call a deadline, each write a `request_id`, each read a token; raises domain errors.

    It does what both interceptors of `channel.py` do.
    """

    def __init__(
        self,
        connection: grpc.Channel,
        address: str,
        timeout: float,
        consistency: Consistency,
        *,
        wait_for_ready: bool,
    ) -> None:
        self._connection = connection
        self._address = address
        self._timeout = timeout
        self._consistency = consistency
        self._wait_for_ready = wait_for_ready

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details = self._with_defaults(client_call_details, self._timeout)
        repeatable = with_request_id(request)
        began = time.monotonic()
        try:
            return self._call(continuation, details, repeatable)
        except OutcomeUnknown:
            if not request_id_of(repeatable):
                raise
            rest = replace(details, timeout=rest_of(details.timeout, began))
            return self._call(continuation, rest, repeatable)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        call = continuation(self._with_defaults(client_call_details, None), request)
        return Responses(call, self._address)

    def _with_defaults(self, details: Any, default_timeout: float | None) -> Details:
        """Return the details of a call, with defaults for those that the caller did not set."""
        timeout = default_timeout if details.timeout is None else details.timeout
        # A call without a deadline must not wait for a server, which may never come.
        may_wait = self._wait_for_ready and timeout is not None
        own = Details(
            details.method,
            timeout,
            details.metadata,
            details.credentials,
            may_wait if details.wait_for_ready is None else details.wait_for_ready,
            details.compression,
        )
        if is_read(details.method):
            return replace(own, metadata=self._consistency.with_token(details.metadata))
        return own

    def _call(self, continuation: Any, details: Details, request: Message) -> Any:
        began = self._consistency.begin()
        call = continuation(details, request)
        error = None
        if isinstance(call, grpc.RpcError) and _has_failed(call):
            cause: Exception = cast("Any", call).exception()
            if not isinstance(cause, grpc.RpcError):  # there was no call, as on a closed channel
                raise cause
            error = error_of_unary(cast("grpc.Call", call), request, self._address)
        if is_write(details.method) and not isinstance(error, InvalidArgument):
            # A future that is in flight counts as a write whose token is lost.
            self._consistency.end(call.trailing_metadata() if call.done() else None, began)
        if isinstance(error, DeadlineExceeded):
            error = error_of_timeout(error, self._address, details.timeout, self._probe())
        if error:
            raise error from None
        return call

    def _probe(self) -> RosterError | None:
        """Return the error of a call that does not wait for a server, None if the channel is connected."""
        check: Any = self._connection.unary_unary(PROBE_METHOD, **PROBE)
        try:
            check(Empty(), timeout=PROBE_SECONDS, wait_for_ready=False)
        except grpc.RpcError as failure:
            return error_from_call(cast("grpc.Call", failure), self._address)
        return None


def _has_failed(call: Any) -> bool:
    """Return whether a call, which may be the future of one that is in flight, has ended with an error."""
    return call.done() and call.exception() is not None


class Responses:
    """A call with a response stream, whose iteration raises domain errors."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except grpc.RpcError as failure:
            raise error_from_call(cast("grpc.Call", failure), self._address) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)
