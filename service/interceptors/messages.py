"""The messages of a call, parsed only once it is admitted: one of 8 MiB can take 70 times that in memory."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from service.errors import MalformedMessage
from service.interceptors.around import Around, Context, Proceed

Parse = Callable[[bytes], Any]


class Messages(Around):
    """Behind the interceptors that look at no message; raised in grpc.aio an error would be UNKNOWN."""

    def __init__(self) -> None:
        super().__init__()
        self._parsers: dict[str, Parse] = {}

    def wrap(self, method: str, handler: Any) -> Any:
        self._parsers[method] = handler.request_deserializer
        return super().wrap(method, handler)._replace(request_deserializer=None)

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        parse = self._parsers[method]
        is_one = isinstance(request, bytes)
        return await proceed(_parsed(parse, request) if is_one else _all_parsed(parse, request), context)


async def _all_parsed(parse: Parse, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(parse, request)


def _parsed(parse: Parse, request: bytes) -> Any:
    try:
        return parse(request)
    except DecodeError:
        kind: Any = getattr(parse, "__self__", None)
        name = kind.DESCRIPTOR.full_name if kind else "message"
        raise MalformedMessage(
            f"the bytes sent are no {name}: truncated, not UTF-8, or nested too deep"
        ) from None
