"""HTTP server for Prometheus that slow or silent clients can't block.

`prometheus_client.start_http_server` uses a thread for each connection and has no timeout.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from http.client import parse_headers
from io import BytesIO
from threading import Thread
from time import perf_counter
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app

MAX_HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 64
SECONDS = 10  # for a request and its response; the default timeout of Prometheus

ERRORS = {400: "400 Bad Request", 503: "503 Service Unavailable"}


class ScrapeServer:
    """Serves a registry on a host and port, in a thread of its own; raises OSError if it can't listen there.

    At most 64 connections may be sending their request; a further one closes the oldest. At most 64 requests
    wait for their response, and making responses takes at most half of a core.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self._socket = listen_on(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._application: Callable[..., Sequence[bytes]] = make_wsgi_app(registry)
        self._reading: dict[asyncio.Task[None] | None, None] = {}  # the oldest first
        self._answering = 0
        self._answer_lock = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and close the connections."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle_connection, sock=self._socket, limit=MAX_HEAD_BYTES)
        async with server:
            await self._stopping.wait()
            server.close()

    async def _handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                head = await self._head(reader)
                writer.write(await self._answer(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (asyncio.CancelledError, TimeoutError, OSError, EOFError):
            pass  # evicted, late, or gone
        finally:
            writer.transport.abort()

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        """Return the request up to its body, empty if it is too large."""
        task = asyncio.current_task()
        if len(self._reading) >= MAX_CONNECTIONS and (oldest := next(iter(self._reading))):
            oldest.cancel()
            del self._reading[oldest]
        self._reading[task] = None
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return b""
        finally:
            self._reading.pop(task, None)

    async def _answer(self, head: bytes) -> bytes:
        environ = _environ(head)
        if environ is None:
            return _response(ERRORS[400], [], b"")
        if self._answering >= MAX_CONNECTIONS:
            return _response(ERRORS[503], [], b"")
        self._answering += 1
        try:
            async with self._answer_lock:
                began = perf_counter()
                answer = self._call(environ)
                await asyncio.sleep(perf_counter() - began)  # leave half of a core to calls
                return answer
        finally:
            self._answering -= 1

    def _call(self, environ: dict[str, str]) -> bytes:
        started: list[tuple[str, list[tuple[str, str]]]] = []
        body = b"".join(
            self._application(environ, lambda *status_and_headers: started.append(status_and_headers))
        )
        return _response(*started[0], body)


def listen_on(host: str, port: int) -> socket.socket:
    """Return a socket that listens; `::` accepts IPv4, too, as for gRPC. Raises OSError."""
    family = socket.getaddrinfo(host, port, flags=socket.AI_PASSIVE)[0][0]
    is_dual = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, dualstack_ipv6=is_dual)


def _environ(head: bytes) -> dict[str, str] | None:
    """Return a request's variables for the WSGI application (PEP 3333); None if it is not HTTP."""
    lines = BytesIO(head)
    try:
        method, target, _ = lines.readline().decode("ascii").split()
        headers = parse_headers(lines)
        url = urlsplit(target)
    except Exception:  # noqa: BLE001 - untrusted bytes
        return None
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": url.path,
        "QUERY_STRING": url.query,
        "HTTP_ACCEPT": headers.get("accept", ""),
        "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", ""),
    }


def _response(status: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    headers = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
