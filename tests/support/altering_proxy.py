"""A proxy in front of a real PostgreSQL that alters what passes: an engine that lacks something."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from sqlalchemy import make_url

from tests.support.fake_postgres import fake_postgres

CHUNK_BYTES = 64 << 10


@asynccontextmanager
async def altering_proxy(url: str, changes: Mapping[bytes, bytes]) -> AsyncIterator[str]:
    """Yield the URL of a database through a proxy that makes these replacements in both directions.

    Old and new text have the same length, so that messages keep theirs.
    """
    assert all(len(old) == len(new) for old, new in changes.items())
    server = make_url(url)
    assert server.host
    host, port = server.host, server.port or 5432

    async def converse(reader: StreamReader, writer: StreamWriter) -> None:
        answers, requests = await asyncio.open_connection(host, port)
        try:
            await asyncio.gather(_pass_on(reader, requests, changes), _pass_on(answers, writer, changes))
        finally:
            requests.close()

    async with fake_postgres(converse) as own:
        yield server.set(host="127.0.0.1", port=own).render_as_string(hide_password=False)


async def _pass_on(reader: StreamReader, writer: StreamWriter, changes: Mapping[bytes, bytes]) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK_BYTES):
            for old, new in changes.items():
                data = data.replace(old, new)
            writer.write(data)
            await writer.drain()
    writer.close()
