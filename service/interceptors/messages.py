"""Reads and parses the messages of a call, once the call is admitted.

gRPC itself would receive the one message of a unary call before anybody asks who calls: a hundred calls on
one connection take a gigabyte. So every call is handed on as a stream, and its message is read here.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc

from service.auth.caller import NOBODY, current_caller
from service.auth.policy import HEALTH
from service.errors import MalformedMessage, TooLarge
from service.interceptors.around import Around, Context, Proceed, host_of, kind
from service.posts.rules import MAX_CONTENT_BYTES
from service.requests import parse, request_class
from service.waits import BoundedWaits

# A user with its 50 posts, as a caller may send back what it has read, has 60 KiB.
MAX_BYTES = 64 << 10
MAX_HEALTH_BYTES = 512
LARGER = {
    "/roster.v1.PostService/CreatePost": MAX_CONTENT_BYTES + MAX_BYTES,
    "/roster.v1.PostService/UpdatePost": MAX_CONTENT_BYTES + MAX_BYTES,
}
# gRPC receives a message whole, and there are its own 5 MiB for one that is too large for its method.
MAX_UNFINISHED = 64
ARRIVAL_SECONDS = 10
CANCELLATION_SECONDS = 0.01
SLOW = f"the message did not arrive within {ARRIVAL_SECONDS} s, or too many are on their way; try again"


Parser = Callable[[bytes], Any]


class Unread(Around):
    """The outermost interceptor: hands each call on before its message is read."""

    def wrap(self, method: str, handler: Any) -> Any:  # noqa: ARG002
        if handler.request_streaming:
            return handler
        behaviour = getattr(handler, kind(handler))
        stream = handler._replace(request_streaming=True, **{kind(handler): None})
        return stream._replace(**{kind(stream): behaviour})


class Messages(Around):
    """Parses messages; the interceptors before it look at none.

    Raises TooLarge and MalformedMessage, and QuotaExceeded for a message that does not arrive. Bulk streams
    get bytes: they answer a message that is too large, and go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unfinished = BoundedWaits(SLOW, MAX_UNFINISHED, ARRIVAL_SECONDS)
        self._arounds: dict[str, Callable[[Proceed, Any, Context], Any]] = {}

    def drain(self) -> None:
        """End the calls whose messages have not arrived; their clients may send them elsewhere."""
        self._unfinished.end_all()

    def wrap(self, method: str, handler: Any) -> Any:
        read = self._stream if handler.request_streaming else self._call
        self._arounds[method] = partial(read, _parser(method, handler))
        return super().wrap(method, handler)._replace(request_deserializer=None)

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        return await self._arounds[method](proceed, request, context)

    async def _call(self, parser: Parser, proceed: Proceed, _: Any, context: Context) -> Any:
        message = await self._unfinished.bound(context.read(), partial(_group, context))
        if message is grpc.aio.EOF:
            # So ends, as seen from here, a call that was cancelled: then the cancellation comes next.
            await asyncio.sleep(CANCELLATION_SECONDS)
            raise MalformedMessage("the call ended without its message")
        return await proceed(parser(message), context)

    async def _stream(self, parser: Parser, proceed: Proceed, requests: Any, context: Context) -> Any:
        return await proceed(_parse_all(parser, requests), context)


async def _parse_all(parser: Parser, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield parser(request)


def _parser(method: str, handler: Any) -> Parser:
    """Return what makes a request of the bytes of one message."""
    is_bulk = handler.request_streaming and method.startswith("/roster.v1.")
    if is_bulk:
        return lambda message: message
    sent = handler.request_deserializer.__self__  # a generated class, whose FromString it is
    most = MAX_HEALTH_BYTES if method in HEALTH else LARGER.get(method, MAX_BYTES)
    return partial(_checked, request_class(sent), most)


def _checked(sent: Any, most: int, message: bytes) -> Any:
    if len(message) > most:
        raise TooLarge(f"a {sent.DESCRIPTOR.name} has at most {most:,} bytes, this one has {len(message):,}")
    request = parse(sent, message)
    request.DiscardUnknownFields()
    return request


def _group(context: Context) -> str:
    """Return whose share of the unfinished messages a call takes: its caller's, or its host's."""
    identity = current_caller().identity
    return host_of(context) if identity == NOBODY.identity else identity
