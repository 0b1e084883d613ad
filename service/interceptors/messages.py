"""Reads and parses the messages of a call, once the call is admitted.

`Chain` explains why it passes every call on as a stream of bytes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from roster.errors import MalformedMessage, TooLarge
from service.auth.caller import NOBODY, current_caller
from service.auth.policy import HEALTH
from service.interceptors.chain import Context, Proceed, Response, Rpc, host_of
from service.posts.rules import MAX_CONTENT_BYTES
from service.requests import parse, request_class
from service.waits import BoundedWaits

# A caller may send back a user as it was read, with its 50 posts: 60 KiB.
MAX_BYTES = 64 << 10
MAX_HEALTH_BYTES = 512
LARGER = {
    "/roster.v1.PostService/CreatePost": MAX_CONTENT_BYTES + MAX_BYTES,
    "/roster.v1.PostService/UpdatePost": MAX_CONTENT_BYTES + MAX_BYTES,
}
# gRPC receives a message whole, up to its own limit of 5 MiB, even if it is too large for its method.
MAX_UNFINISHED = 64
ARRIVAL_SECONDS = 10
CANCELLATION_SECONDS = 0.01
SLOW = f"the message did not arrive within {ARRIVAL_SECONDS} s, or too many are arriving; try again"

Parser = Callable[[bytes], Message]


class Messages:
    """Parses messages; the interceptors before it don't use them.

    Raises TooLarge and MalformedMessage, and QuotaExceeded for a message that does not arrive. Bulk streams
    get bytes: they report a message that is too large, and continue.
    """

    def __init__(self) -> None:
        self._unfinished = BoundedWaits(SLOW, MAX_UNFINISHED, ARRIVAL_SECONDS)

    def drain(self) -> None:
        """End the calls whose messages have not arrived; their clients may send them to another server."""
        self._unfinished.end_all()

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Give an RPC its parsed request, or an iterator over the requests of an upload."""
        if rpc.is_upload and rpc.path.startswith("/roster.v1."):  # a bulk stream
            return proceed
        parser = _parser(rpc)

        async def parse_stream(requests: AsyncIterator[bytes], context: Context) -> Response:
            return await proceed(_parse_all(parser, requests), context)

        async def parse_request(_: AsyncIterator[bytes], context: Context) -> Response:
            message = await self._read(context)
            return await proceed(parser(message), context)

        return parse_stream if rpc.is_upload else parse_request

    async def _read(self, context: Context) -> bytes:
        """Return the one message of a call."""
        message: Any = await self._unfinished.bound(context.read(), partial(_group, context))
        if message is grpc.aio.EOF:
            # A cancelled call looks like this at first, and its cancellation follows.
            await asyncio.sleep(CANCELLATION_SECONDS)
            raise MalformedMessage("the call ended without its message")
        return bytes(message)


async def _parse_all(parser: Parser, requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for request in requests:
        yield parser(request)


def _parser(rpc: Rpc) -> Parser:
    """Return the function that parses a message of an RPC."""
    limit = MAX_HEALTH_BYTES if rpc.path in HEALTH else LARGER.get(rpc.path, MAX_BYTES)
    return partial(_parse, request_class(rpc.request_type), limit)


def _parse(request_type: type[Message], limit: int, message: bytes) -> Message:
    if len(message) > limit:
        name = request_type.DESCRIPTOR.name
        raise TooLarge(f"a {name} has at most {limit:,} bytes, this one has {len(message):,}")
    request = parse(request_type, message)
    request.DiscardUnknownFields()
    return request


def _group(context: Context) -> str:
    """Return the group that an unfinished message counts for: its caller or, if unknown, its host."""
    identity = current_caller().identity
    return host_of(context) if identity == NOBODY.identity else identity
