"""A server that fails as PostgreSQL, a proxy, or something else on its port can fail."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# https://www.postgresql.org/docs/current/protocol-message-formats.html
REQUEST_BYTES = 8  # of SSLRequest
AUTHENTICATION_OK = b"R\0\0\0\x08\0\0\0\0"
SERVER_VERSION = b"S\0\0\0\x18server_version\x0017.0\0"
READY = b"Z\0\0\0\x05I"
RESET_SECONDS = 0.1
NO_LINGER = struct.pack("ii", 1, 0)  # a close is a reset


@asynccontextmanager
async def fake_postgres(converse: Conversation) -> AsyncIterator[int]:
    """Listen on a free port of 127.0.0.1, hold this conversation with each client, and yield the port."""
    tasks: set[asyncio.Task[None]] = set()

    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(talk(reader, writer)))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await converse(reader, writer)
            await writer.drain()
        except (OSError, EOFError):
            pass  # the client has ended
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the connection at once."""


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accept the connection, and answer nothing."""
    await reader.read()


async def close_after_startup(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read the startup message, and close the connection."""
    await read_startup(reader, writer)


async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer in another protocol."""
    await reader.readexactly(REQUEST_BYTES)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def send_garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the startup message with bytes that are no message."""
    await read_startup(reader, writer)
    writer.write(b"\xff\0\0\0\x04\xff\xff\xff\xff garbage")


async def fail_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Agree to TLS, and break off its handshake."""
    await reader.readexactly(REQUEST_BYTES)
    writer.write(b"S")
    await reader.read(1)
    writer.write(b"no handshake")


async def close_in_first_statement(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the client log in, and close the connection when it sends a statement."""
    await read_startup(reader, writer)
    writer.write(AUTHENTICATION_OK + SERVER_VERSION + READY)
    await reader.read(1)


async def have_no_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the client log in without any of the parameters that PostgreSQL reports."""
    await read_startup(reader, writer)
    writer.write(AUTHENTICATION_OK + READY)
    await reader.read(1)


def refuse(code: str, message: str) -> Conversation:
    """Return a conversation that ends with this error after the startup message."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_startup(reader, writer)
        writer.write(error(code, message))

    return converse


def reset_with(code: str, message: str) -> Conversation:
    """Return a conversation that ends in the first statement, with this error and a reset."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_startup(reader, writer)
        writer.write(AUTHENTICATION_OK + SERVER_VERSION + READY)
        await reader.read(1)
        writer.write(error(code, message))
        await asyncio.sleep(RESET_SECONDS)  # a reset that comes together with an error discards it
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)

    return converse


def error(code: str, message: str) -> bytes:
    """Return the message of an error."""
    fields = f"SFATAL\0VFATAL\0C{code}\0M{message}\0\0".encode()
    return b"E" + (len(fields) + 4).to_bytes(4) + fields


async def read_startup(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Refuse TLS if the client asks for it, and read its startup message."""
    request = await reader.readexactly(REQUEST_BYTES)
    if int.from_bytes(request[:4]) == REQUEST_BYTES:
        writer.write(b"N")
        request = await reader.readexactly(REQUEST_BYTES)
    await reader.readexactly(int.from_bytes(request[:4]) - REQUEST_BYTES)
