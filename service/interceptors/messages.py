"""The messages of a call, parsed only once it is admitted: one of 8 MiB can take 70 times that in memory."""

from typing import Any

from google.protobuf.message import DecodeError

from service.errors import MalformedMessage
from service.interceptors.around import Around


class Messages(Around):
    """Behind the interceptors that look at no message; raised in grpc.aio an error would be UNKNOWN."""

    def __init__(self) -> None:
        super().__init__()
        self._parsers: dict[str, Any] = {}

    def wrap(self, method: str, handler: Any) -> Any:
        self._parsers[method] = handler.request_deserializer
        return super().wrap(method, handler)._replace(request_deserializer=None)

    def received(self, method: str, request: Any) -> Any:
        parse = self._parsers[method]
        try:
            return parse(request)
        except DecodeError:
            kind = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
            name = kind.full_name if kind else method
            raise MalformedMessage(
                f"the bytes sent are no {name}: truncated, not UTF-8, or nested too deep"
            ) from None
