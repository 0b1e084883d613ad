"""A proxy that answers calls with HTTP and without gRPC, frame by frame as nginx 1.22 does (RFC 9113)."""

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from google.protobuf.message import Message
from hpack import Decoder, Encoder

from tests.support.raw_http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    framed,
)

NO_ERROR, INTERNAL_ERROR = 0, 2
NOT_FOUND = (("content-type", "application/grpc"), ("grpc-status", "5"))  # from the proxied server
PAGE = b"<html><head><title>nginx</title></head><body>This is not gRPC.</body></html>\r\n"


class Http2Proxy:
    """Answers each call with a status and a page; `calls` counts them by path."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.calls: Counter[str] = Counter()
        self._paths: dict[int, str] = {}
        self._encoder = Encoder()

    def on_call(self, stream: int, path: str) -> bytes:  # noqa: ARG002 - for subclasses
        """Return the frames that answer the headers of a call."""
        return self.page(stream)

    def on_data(self, stream: int, size: int) -> bytes:  # noqa: ARG002
        """Return the frames that answer a piece of the request's body."""
        return b""

    def page(self, stream: int) -> bytes:
        """Return the frames of an answer in HTML."""
        head = self.head(stream, self.status, ("content-type", "text/html"))
        code = struct.pack(">I", NO_ERROR)
        return head + frame(DATA, END_STREAM, stream, PAGE) + frame(RST_STREAM, 0, stream, code)

    def head(self, stream: int, status: int, *fields: tuple[str, str], flags: int = END_HEADERS) -> bytes:
        """Return the frame of an answer's headers."""
        block = self._encoder.encode([(":status", str(status)), ("server", "nginx/1.22.1"), *fields])
        return frame(HEADERS, flags, stream, block)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self._encoder, decoder = Encoder(), Decoder()
        writer.write(frame(SETTINGS, 0, 0))
        # Python 3.11 logs the cancellation of a task that serves a connection as an error.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readexactly(len(PREFACE))
            while True:
                head = await reader.readexactly(9)
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                writer.write(self._answer(kind, flags, stream, payload, decoder))
                await writer.drain()
        writer.close()

    def _answer(self, kind: int, flags: int, stream: int, payload: bytes, decoder: Decoder) -> bytes:
        if kind == SETTINGS and not flags & ACK:
            return frame(SETTINGS, ACK, 0)
        if kind == PING and not flags & ACK:
            return frame(PING, ACK, 0, payload)
        if kind == HEADERS:
            path = {_text(name): _text(value) for name, value in decoder.decode(payload)}[":path"]
            self.calls[path] += 1
            return self.on_call(stream, path)
        if kind == DATA and payload:
            room = struct.pack(">I", len(payload))
            updates = [frame(WINDOW_UPDATE, 0, number, room) for number in (0, stream)]
            return b"".join(updates) + self.on_data(stream, len(payload))
        return b""


class ResettingProxy(Http2Proxy):
    """Resets a bulk stream above a size of the request, after its first response; passes unary calls on.

    nginx does this at `client_max_body_size`: it can't send 413 once the response has begun.
    """

    def __init__(self, opened: Message, max_bytes: int) -> None:
        super().__init__(404)
        self._opened = opened
        self._max_bytes = max_bytes
        self._received: Counter[int] = Counter()

    def on_call(self, stream: int, path: str) -> bytes:
        if "/Bulk" not in path.removeprefix("/roster.v1.BulkService"):
            return self.head(stream, 200, *NOT_FOUND, flags=END_HEADERS | END_STREAM)
        self._received[stream] = 0
        head = self.head(stream, 200, ("content-type", "application/grpc"))
        return head + frame(DATA, 0, stream, framed(self._opened.SerializeToString()))

    def on_data(self, stream: int, size: int) -> bytes:
        before = self._received[stream]
        self._received[stream] += size
        if before <= self._max_bytes < self._received[stream]:
            return frame(RST_STREAM, 0, stream, struct.pack(">I", INTERNAL_ERROR))
        return b""


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


@asynccontextmanager
async def listening(proxy: Http2Proxy) -> AsyncIterator[str]:
    """Run a proxy on a free port, and yield its address."""
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"
