"""The chain of interceptors: each is a function around the next, called once for each RPC.

    def count_calls(rpc: Rpc, proceed: Proceed) -> Proceed:
        counter = CALLS.labels(rpc.path)  # once for each RPC

        async def counted(request: Any, context: Context) -> Any:
            counter.inc()  # for each call
            return await proceed(request, context)

        return counted

An interceptor that has state of its own is a method of a class.
"""

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from service.status import CODES

Context = grpc.aio.ServicerContext[Any, Any]
# Takes a request, or the iterator over the requests of an upload, and returns the response, or None once
# it has written the responses of a stream to the context.
Proceed = Callable[[Any, Context], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Rpc:
    """What interceptors know of an RPC; `path` is its name on the wire, `/roster.v1.UserService/GetUser`."""

    path: str
    request_type: type[Message]
    is_upload: bool  # the client sends a stream
    is_download: bool  # the server sends a stream

    @property
    def is_stream(self) -> bool:
        return self.is_upload or self.is_download

    @property
    def service(self) -> str:
        return self.path.split("/")[1]

    @property
    def name(self) -> str:
        return self.path.split("/")[2]


Interceptor = Callable[[Rpc, Proceed], Proceed]


class Chain(grpc.aio.ServerInterceptor):
    """Surrounds every call of a server with interceptors, the first of them outermost.

    gRPC hands each call on before its message is read, whatever its kind. Otherwise it would receive the one
    message of a unary call before anything is known about the caller: a hundred calls on one connection take
    a gigabyte. So one of the interceptors has to be `Messages.intercept`, which reads and parses messages.

    The responses of a stream are written inside the chain, not yielded through it: a client that goes away
    then cancels the call where it stands, and every `finally` runs at once.
    """

    def __init__(self, *interceptors: Interceptor) -> None:
        self._interceptors = interceptors
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        path = handler_call_details.method
        if path not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:  # gRPC answers UNIMPLEMENTED; a stranger's paths must not fill the memory
                return None
            self._handlers[path] = self._surround(path, handler)
        return self._handlers[path]

    def _surround(self, path: str, handler: Any) -> Any:
        """Return a handler whose calls go through the chain."""
        rpc = Rpc(
            path,
            handler.request_deserializer.__self__,  # a generated class, whose FromString it is
            handler.request_streaming,
            handler.response_streaming,
        )
        if rpc.is_download:
            proceed = _write_responses(handler.stream_stream or handler.unary_stream)
        else:
            proceed = handler.stream_unary or handler.unary_unary
        for interceptor in reversed(self._interceptors):
            proceed = interceptor(rpc, proceed)
        make_handler: Callable[..., Any] = (
            grpc.stream_stream_rpc_method_handler if rpc.is_download else grpc.stream_unary_rpc_method_handler
        )
        # Without a deserializer gRPC hands over bytes.
        return make_handler(proceed, None, handler.response_serializer)


def code_at_end(context: Context) -> grpc.StatusCode:
    """Return the status code of a call; to be called in a `finally` around it."""
    if isinstance(sys.exception(), asyncio.CancelledError):
        is_late = context.time_remaining() == 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
    code: Any = context.code()  # after an abort a StatusCode, otherwise a number or None
    return code if isinstance(code, grpc.StatusCode) else CODES[code or 0]


def host_of(context: Context) -> str:
    """Return the address of a call's client, without its port."""
    return context.peer().rpartition(":")[0]


def _write_responses(behaviour: Callable[..., Any]) -> Proceed:
    """Return a coroutine function that writes the responses that a method returns as an iterator."""
    if inspect.iscoroutinefunction(inspect.unwrap(behaviour)):
        return behaviour  # it writes its responses itself

    async def write_all(request: Any, context: Context) -> None:
        responses: AsyncIterator[Any] = behaviour(request, context)
        async with aclosing(responses):  # type: ignore[type-var]
            async for response in responses:
                await context.write(response)

    return write_all
