"""The consumers in `examples/changes/`: after kills, restarts and resets they have what the database has."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, update

from service.changes.reset import reset_feed
from service.server import Server
from service.users.model import User
from tests.e2e.clients import CHECKOUT
from tests.support.command import ended, start
from tests.support.languages import NEEDS_GO, build_go, install_packages, node
from tests.support.random_changes import RandomChanges, read_rows
from tests.support.rows import add_users

EXAMPLES = CHECKOUT / "examples/changes"


class Consumer:
    """A consumer in one language."""

    def __init__(self, command: tuple[str | Path, ...], address: str, folder: Path) -> None:
        self._command = command
        self._address = address
        self._folder = folder

    @asynccontextmanager
    async def running(self, kind: str) -> AsyncIterator[None]:
        """Run a sink, and kill it at the end of the block."""
        file = self._folder / f"{kind}.db"
        self._process = await start(*self._command, kind, self._address, file)
        try:
            async with asyncio.timeout(30):
                yield
        finally:
            self._process.kill()
            await ended(self._process)

    async def ask(self, question: object) -> str:
        """Return what it has for a question."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{question}\n".encode())
        answer = await self._process.stdout.readline()
        if not answer:
            raise AssertionError((await ended(self._process)).err)
        return answer.decode().removesuffix("\n")

    async def until(self, question: object, expected: str) -> None:
        """Ask until it gives this answer."""
        while await self.ask(question) != expected:  # noqa: ASYNC110  (another process changes it)
            await asyncio.sleep(0.02)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the examples are independent of it."""
    return sqlite_url


async def python(server: Server, folder: Path) -> Consumer:
    return Consumer((sys.executable, EXAMPLES / "consumer.py"), server.address, folder)


async def typescript(server: Server, folder: Path) -> Consumer:
    install_packages(folder)
    (folder / "consumer.mjs").write_text((EXAMPLES / "consumer.mjs").read_text())
    return Consumer((node(), folder / "consumer.mjs"), server.address, folder)


async def go(server: Server, folder: Path) -> Consumer:
    programs = build_go(folder / "programs", ".", module=EXAMPLES)
    return Consumer((programs / "consumer",), server.address, folder)


@pytest.mark.parametrize("language", [python, typescript, pytest.param(go, marks=NEEDS_GO)])
async def test_consumers_have_what_the_database_has(
    server: Server, tmp_path: Path, language: Callable[[Server, Path], Awaitable[Consumer]]
) -> None:
    consumer = await language(server, tmp_path)
    async with server.database.begin() as session:
        users = [{"email": f"{name}@x.org", "full_name": name} for name in ("Ada Lovelace", "Alan Turing")]
        await session.execute(insert(User), users)
    await check_store(consumer, server, "mirror")
    await check_store(consumer, server, "index")
    await check_cache(consumer, server)


async def check_store(consumer: Consumer, server: Server, kind: str) -> None:
    """Check one that is killed; then, while it runs again, the feed is reset."""
    changes = RandomChanges(server.database, seed=len(kind))
    async with consumer.running(kind):
        await changes.make(10)
        await check_rows(consumer, server, kind)
    await changes.make(10)
    async with consumer.running(kind):
        await check_rows(consumer, server, kind)
        await reset_feed(server.database, is_forced=True)
        await changes.make(10)
        await check_rows(consumer, server, kind)


async def check_rows(consumer: Consumer, server: Server, kind: str) -> None:
    """Check all rows, once the consumer has the last change, which is made now."""
    [last] = await add_users(server.database, email=f"{os.urandom(4).hex()}@x.org", full_name="Last 1")
    async with server.database.begin() as session:
        await session.execute(update(User).where(User.id == last).values(full_name=f"Last {last}x"))
    if kind == "index":
        await consumer.until(f"{last}x", str(last))
    else:
        await consumer.until(last, f"Last {last}x")
    users, _ = await read_rows(server.database)
    names = {id: name or "" for id, _, name, *_ in users}
    if kind == "mirror":
        assert [await consumer.ask(id) for id in names] == list(names.values())
        deleted = set(range(1, last)) - names.keys()
        assert {await consumer.ask(id) for id in deleted} == {"-"}
        return
    for word in {word for name in names.values() for word in name.lower().split()} | {"nobody", "lovelace"}:
        ids = [str(id) for id, name in names.items() if word in name.lower().split()]
        assert await consumer.ask(word) == (" ".join(ids) or "-")


async def check_cache(consumer: Consumer, server: Server) -> None:
    """Check that a change and a deletion replace what was read, also after the feed was reset."""
    [id] = await add_users(server.database, email="c@x.org", full_name="Grace")
    async with consumer.running("cache"):
        await consumer.until(id, "hit Grace")
        for name, resets in (("Barbara", False), ("Edsger", True)):
            if resets:
                await reset_feed(server.database, is_forced=True)
                await consumer.until(id, "miss Barbara")
                await consumer.until(id, "hit Barbara")
            async with server.database.begin() as session:
                await session.execute(update(User).where(User.id == id).values(full_name=name))
            await consumer.until(id, f"hit {name}")
        async with server.database.begin() as session:
            await session.execute(delete(User).where(User.id == id))
        await consumer.until(id, "hit -")
