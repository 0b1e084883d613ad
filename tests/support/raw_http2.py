"""A raw HTTP/2 client: it sends any frame, in any order, as an attacker would (RFC 9113).

Flow control is honoured when DATA is sent, since a peer that breaks it only loses its connection.
"""

import asyncio
import ssl
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    2,
    3,
    4,
    6,
    7,
    8,
    9,
)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
DEFAULT_WINDOW = 65_535
FRAME_BYTES = 16_384

Header = tuple[bytes, bytes]


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header field as HPACK's literal without indexing (RFC 7541, 6.2.2)."""
    return b"\0" + _string(name) + _string(value)


def grpc_headers(path: str, *extra: Header) -> bytes:
    """Return the header block of a call."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *extra,
    )
    return b"".join(literal(name, value) for name, value in fields)


def framed(message: bytes, announced: int | None = None) -> bytes:
    """Return a message with gRPC's prefix, which may announce another length."""
    return struct.pack(">BI", 0, len(message) if announced is None else announced) + message


class Http2Connection:
    """One connection; what comes back is kept by stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.headers: dict[int, dict[str, str]] = defaultdict(dict)
        self.bodies: dict[int, int] = defaultdict(int)  # bytes of DATA
        self.resets: dict[int, int] = {}  # stream -> error code
        self.goaway: int | None = None  # error code
        self.pongs = 0  # acknowledged pings
        self.is_closed = asyncio.Event()
        self.next_stream = 1
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder()
        self._initial_window = DEFAULT_WINDOW
        self._windows: dict[int, int] = defaultdict(lambda: self._initial_window)
        self._connection_window = DEFAULT_WINDOW
        self._changed = asyncio.Event()
        self._receiving = asyncio.create_task(self._receive())

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        """Send one frame."""
        head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
        self._writer.write(head + payload)

    async def drain(self) -> None:
        """Wait until the socket has room; a connection that the server has closed is not an error."""
        with suppress(ConnectionError):
            await self._writer.drain()

    def open(self, path: str, *extra: Header, end: bool = False) -> int:
        """Begin a call, and return its stream."""
        stream = self.next_stream
        self.next_stream += 2
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.frame(HEADERS, flags, stream, grpc_headers(path, *extra))
        return stream

    async def send(self, stream: int, body: bytes, *, end: bool = False) -> None:
        """Send DATA as fast as the peer's windows allow; return early if the stream or connection ends."""
        view = memoryview(body)
        while view and not self._has_ended(stream):
            room = min(self._windows[stream], self._connection_window, FRAME_BYTES, len(view))
            if room <= 0:
                await self._wait_for_change()
                continue
            self._windows[stream] -= room
            self._connection_window -= room
            is_last = end and room == len(view)
            self.frame(DATA, END_STREAM if is_last else 0, stream, bytes(view[:room]))
            view = view[room:]
            await self.drain()
        if end and not body:
            self.frame(DATA, END_STREAM, stream)

    async def status(self, stream: int) -> int | None:
        """Wait for the end of a call, and return its grpc-status; None if it was reset without one."""
        while "grpc-status" not in self.headers[stream] and not self._has_ended(stream):
            await self._wait_for_change()
        status = self.headers[stream].get("grpc-status")
        return None if status is None else int(status)

    async def answered(self, stream: int) -> None:
        """Wait for the first DATA of a call, or its end."""
        while not self.bodies[stream] and "grpc-status" not in self.headers[stream]:
            if self._has_ended(stream):
                return
            await self._wait_for_change()

    async def until(self, is_done: Callable[[], bool]) -> None:
        """Wait until a condition holds, or the connection has ended."""
        while not is_done() and not self.is_closed.is_set():
            await self._wait_for_change()

    async def close(self) -> None:
        """Break the connection off, as a client does that dies."""
        self._receiving.cancel()
        self._writer.transport.abort()
        await asyncio.wait([self._receiving])

    def _has_ended(self, stream: int) -> bool:
        return self.is_closed.is_set() or stream in self.resets

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _receive(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                self._take(kind, flags, stream, await self._reader.readexactly(size))
                self._changed.set()
        except (OSError, asyncio.IncompleteReadError):
            self.is_closed.set()
            self._changed.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == HEADERS:
            fields = self._decoder.decode(payload)
            self.headers[stream].update({_text(name): _text(value) for name, value in fields})
        elif kind == DATA:
            self.bodies[stream] += len(payload)
        elif kind == RST_STREAM:
            self.resets[stream] = int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == WINDOW_UPDATE:
            self._widen(stream, int.from_bytes(payload, "big"))
        elif kind == SETTINGS and not flags & ACK:
            self._apply(payload)
        elif kind == PING and flags & ACK:
            self.pongs += 1
        elif kind == PING:
            self.frame(PING, ACK, 0, payload)

    def _widen(self, stream: int, by: int) -> None:
        if stream:
            self._windows[stream] += by
        else:
            self._connection_window += by

    def _apply(self, settings: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", settings):
            if name == INITIAL_WINDOW_SIZE:
                for stream in self._windows:
                    self._windows[stream] += value - self._initial_window
                self._initial_window = value
        self.frame(SETTINGS, ACK, 0)


@asynccontextmanager
async def http2(address: str, ca: Path | None = None) -> AsyncIterator[Http2Connection]:
    """Open a connection, over TLS if there is an authority to check the server's certificate by."""
    connection = await connect(address, ca)
    try:
        yield connection
    finally:
        await connection.close()


async def connect(
    address: str, ca: Path | None = None, settings: Sequence[tuple[int, int]] = ()
) -> Http2Connection:
    """Open a connection that the caller closes."""
    host, _, port = address.rpartition(":")
    tls = None
    if ca:
        tls = ssl.create_default_context(cafile=ca)
        tls.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
    connection = Http2Connection(reader, writer)
    writer.write(PREFACE)
    connection.frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings))
    return connection


def _string(text: bytes) -> bytes:
    return _integer(len(text)) + text


def _integer(number: int) -> bytes:
    """Return an integer with a prefix of 7 bits (RFC 7541, 5.1)."""
    if number < 127:
        return bytes([number])
    encoded, number = bytearray([127]), number - 127
    while number >= 128:
        encoded.append(number % 128 + 128)
        number //= 128
    encoded.append(number)
    return bytes(encoded)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
