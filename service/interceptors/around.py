"""What every interceptor here is: one context manager around each whole call, its streams included."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class Around(grpc.aio.ServerInterceptor):
    """Interceptor that surrounds a call with `around`.

    A stream's messages are written inside the context manager, not yielded through it: a client that
    goes away then cancels the call where it stands, and every `finally` runs at once.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """Return what surrounds one call of a method, named as on the wire."""
        raise NotImplementedError

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:  # unknown: the core answers UNIMPLEMENTED
                return None
            self._wrapped[method] = self.wrap(method, handler)
        return self._wrapped[method]

    def wrap(self, method: str, handler: Any) -> Any:
        """Return the handler with its behaviour surrounded; done once a method."""
        kind = _kind(handler)
        behaviour = _awaitable(getattr(handler, kind))
        received = self.received_stream if handler.request_streaming else self.received

        async def surrounded(request: Any, context: Context) -> Any:
            async with self.around(method, context):
                return await behaviour(received(method, request), context)

        return handler._replace(**{kind: surrounded})

    def received(self, method: str, request: Any) -> Any:  # noqa: ARG002
        """Return a message as the servicer is to see it."""
        return request

    async def received_stream(self, method: str, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Return a stream of messages as the servicer is to see it."""
        async for request in requests:
            yield self.received(method, request)


def _kind(handler: Any) -> str:
    requests = "stream" if handler.request_streaming else "unary"
    responses = "stream" if handler.response_streaming else "unary"
    return f"{requests}_{responses}"


def _awaitable(behaviour: Callable[..., Any]) -> Behaviour:
    """Return a behaviour that writes its responses itself where it was a generator."""
    if not inspect.isasyncgenfunction(inspect.unwrap(behaviour)):
        return behaviour

    async def written(request: Any, context: Context) -> None:
        responses: AsyncIterator[Any] = behaviour(request, context)
        async with aclosing(responses):  # type: ignore[type-var]
            async for response in responses:
                await context.write(response)

    return written
