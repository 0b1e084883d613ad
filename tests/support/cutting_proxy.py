"""A proxy that cuts connections, as a server that is killed does."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from tests.support.fake_postgres import fake_postgres

CHUNK_BYTES = 64 << 10


class CuttingProxy:
    """Passes on connections to `address`; cuts one before it passes on data for which `cuts` is true."""

    def __init__(self, server: str, cuts: Callable[[bytes], bool], *, answers: bool) -> None:
        self.address = ""
        self.times = 0  # that it has cut a connection
        self._server = server
        self._cuts = cuts
        self._answers = answers

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Pass on one connection until it ends or is cut."""
        host, port = self._server.rsplit(":", 1)
        answers, requests = await asyncio.open_connection(host, int(port))
        both = (
            self._pass_on(reader, requests, watched=not self._answers),
            self._pass_on(answers, writer, watched=self._answers),
        )
        tasks = [asyncio.create_task(one) for one in both]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            requests.transport.abort()
            writer.transport.abort()

    async def _pass_on(self, reader: StreamReader, writer: StreamWriter, *, watched: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                if watched and self._cuts(data):
                    self.times += 1
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def cutting_proxy(
    server: str, cuts: Callable[[bytes], bool], *, answers: bool = False
) -> AsyncIterator[CuttingProxy]:
    """Run a proxy in front of a server; it examines what clients send, or the `answers`."""
    proxy = CuttingProxy(server, cuts, answers=answers)
    async with fake_postgres(proxy.serve) as port:
        proxy.address = f"127.0.0.1:{port}"
        yield proxy
