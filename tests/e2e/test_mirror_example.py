"""`examples/mirror.py`: killed, run again, and still an exact copy."""

import asyncio
import sqlite3
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from service.changes.reset import reset_feed
from service.server import Server
from tests.e2e.clients import CHECKOUT
from tests.support.command import ended, start
from tests.support.fake_postgres import fake_postgres
from tests.support.random_changes import RandomChanges, Rows, read_rows
from tests.support.rows import add_posts, add_users


class MirrorExample:
    """The program on a file."""

    def __init__(self, server: Server, path: Path, address: str = "") -> None:
        self._server = server
        self._path = path
        self._address = address or server.address

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run it, and kill it at the end of the block."""
        process = await start(
            *(sys.executable, CHECKOUT / "examples/mirror.py", self._path),
            ROSTER_ADDRESS=self._address,
        )
        try:
            async with asyncio.timeout(30):
                yield
        finally:
            process.kill()
            done = await ended(process)
            assert "Traceback" not in done.err

    def rows(self) -> tuple[Rows, Rows]:
        """Return its users and posts, without the times."""
        users = self._read("SELECT id, email, full_name, is_active, version FROM user ORDER BY id")
        return users, self._read("SELECT id, title, content, author_id, version FROM post ORDER BY id")

    def token(self) -> str:
        """Return the token that it has stored, "" if there is none."""
        return "".join(token for [token] in self._read("SELECT token FROM feed"))

    async def until_exact(self) -> Rows:
        """Wait until it equals the tables of the server, and return the users."""
        expected = await read_rows(self._server.database)
        await self.until(lambda: self.rows() == expected)
        return expected[0]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        while not condition():  # noqa: ASYNC110  (another process fulfils it)
            await asyncio.sleep(0.01)

    def _read(self, query: str) -> Rows:
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as db:
                return db.execute(query).fetchall()
        except sqlite3.OperationalError:  # it has not created its tables yet
            return []


@pytest.fixture
def example(server: Server, tmp_path: Path) -> MirrorExample:
    return MirrorExample(server, tmp_path / "mirror.db")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_is_exact_after_kills_and_a_reset(
    example: MirrorExample, server: Server, tmp_path: Path
) -> None:
    """It is killed while it copies and while it follows, and the feed is reset while it is away."""
    ids = await add_users(server.database, 1000)
    await add_posts(server.database, ids)
    writes = RandomChanges(server.database, seed=20)
    async with example.running():
        await example.until((tmp_path / "mirror.db-wal").exists)
    async with example.running():
        await example.until(lambda: bool(example.token()))
        before = example.token()
        await writes.make(10)
        await example.until(lambda: example.token() != before)
    await writes.make(30)
    await reset_feed(server.database, is_forced=True)
    await writes.make(10)
    async with example.running():
        for _ in range(3):
            await writes.make(5)
            users = await example.until_exact()

    assert len(users) > len(ids) - 50


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_copies_again_after_a_lost_connection(server: Server, tmp_path: Path) -> None:
    """No call has succeeded completely yet, but the address is right."""
    ids = await add_users(server.database, 3000)
    async with breaking_once(server.address, after_bytes=100_000) as (address, was_broken):
        example = MirrorExample(server, tmp_path / "mirror.db", address)
        async with example.running():
            users = await example.until_exact()

    assert was_broken.is_set()
    assert len(users) == len(ids)


@asynccontextmanager
async def breaking_once(address: str, after_bytes: int) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """Yield the address of a proxy that breaks its first connection after this many bytes of answers."""
    was_broken = asyncio.Event()

    async def converse(reader: StreamReader, writer: StreamWriter) -> None:
        answers, requests = await asyncio.open_connection(*address.rsplit(":", 1))
        try:
            await asyncio.gather(pass_on(reader, requests), pass_on(answers, writer, after_bytes))
        finally:
            requests.close()

    async def pass_on(reader: StreamReader, writer: StreamWriter, end: int = sys.maxsize) -> None:
        passed = 0
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
            passed += len(data)
            if passed > end and not was_broken.is_set():
                was_broken.set()
                break
        writer.close()

    async with fake_postgres(converse) as port:
        yield f"127.0.0.1:{port}", was_broken
