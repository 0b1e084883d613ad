"""Pauses between retries: they end when a server that was away is back, and only then."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest

from roster.client import Backoff, BulkLoader, Disconnected, channel
from roster.client.errors import ProxyUnavailable
from roster.errors import Overloaded, RosterError
from roster.v1.bulk_pb2 import BulkAck, BulkOptions, BulkSummary
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.server import serve

NEVER = 3600.0  # seconds; a test that waited for the end of a pause would not end
LOST = Disconnected("Socket closed")


@pytest.fixture(autouse=True)
def _long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every pause longer than a test may take."""
    monkeypatch.setattr("roster.client.backoff.MAX_PAUSE_SECONDS", NEVER)
    monkeypatch.setattr("roster.client.backoff.random.uniform", max_pause)


def max_pause(shortest: float, longest: float) -> float:
    """Return the longest pause, without jitter; none at all where the shortest is 0."""
    return longest if shortest else 0.0


class Outages:
    """The network to a server, which can fail: connections break, and new ones are refused."""

    def __init__(self, folder: Path, server: str) -> None:
        self.address = f"unix:{folder}/relay.sock"
        self._path = folder / "relay.sock"
        self._server_path = server.removeprefix("unix:")
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        """Let clients through."""
        self._listener = await asyncio.start_unix_server(self._relay, self._path)

    async def stop(self) -> None:
        """Break all connections."""
        self._listener.close()
        self._path.unlink(missing_ok=True)
        while self._writers:
            self._writers.pop().transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_unix_connection(self._server_path)
        self._writers += [writer, to_server[1]]
        await asyncio.gather(_copy(reader, to_server[1]), _copy(to_server[0], writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@pytest.fixture
async def outages(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Outages]:
    """The network to a server; it works at first."""
    async with serve(sqlite_url, listen=f"unix:{tmp_path}/server.sock") as server:
        outages = Outages(tmp_path, server.address)
        await outages.start()
        yield outages
        await outages.stop()


async def reach(connection: grpc.aio.Channel, *, ready: bool) -> None:
    """Wait until the channel is connected, or no longer is."""
    while ((state := connection.get_state(try_to_connect=True)) is grpc.ChannelConnectivity.READY) != ready:
        await connection.wait_for_state_change(state)


async def restart(outages: Outages, connection: grpc.aio.Channel) -> None:
    """Stop the server, start it again, and wait until the channel is connected to it."""
    await outages.stop()
    await reach(connection, ready=False)
    await outages.start()
    await reach(connection, ready=True)
    for _ in range(100):  # what this event wakes runs before the test goes on
        await asyncio.sleep(0)


@asynccontextmanager
async def pausing(backoff: Backoff, failure: RosterError) -> AsyncIterator["asyncio.Task[None]"]:
    """Wait for the next retry in a task that has begun its pause."""
    task = asyncio.create_task(backoff.wait(failure))
    await asyncio.sleep(0)
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def watching(connection: grpc.aio.Channel) -> Backoff:
    """Return a backoff that watches a channel, after a call that has succeeded."""
    backoff = Backoff(first_pause_seconds=NEVER)
    backoff.watch(connection)
    backoff.reset()
    return backoff


@pytest.mark.parametrize("is_away_first", [True, False], ids=["away", "not noticed yet"])
async def test_pause_ends_when_the_server_is_back(outages: Outages, *, is_away_first: bool) -> None:
    """It does not matter whether the channel knew of the outage when the pause began."""
    async with asyncio.timeout(30), channel(outages.address) as connection:
        await reach(connection, ready=True)
        if is_away_first:
            await outages.stop()
            await reach(connection, ready=False)
        async with pausing(watching(connection), LOST) as pause:
            await restart(outages, connection)
            await pause


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Overloaded("too many calls"), id="the server is overloaded"),
        pytest.param(ProxyUnavailable("HTTP 503"), id="a proxy answers for the server"),
    ],
)
async def test_pause_is_kept_if_something_answered(outages: Outages, failure: RosterError) -> None:
    """A new connection does not mean that it has time for the next call."""
    async with channel(outages.address) as connection:
        await reach(connection, ready=True)
        async with pausing(watching(connection), failure) as pause:
            await restart(outages, connection)
            assert not pause.done()


async def test_pause_is_kept_while_the_channel_stays_connected(outages: Outages) -> None:
    """A load balancer that can't reach a server may answer UNAVAILABLE itself."""
    async with channel(outages.address) as connection:
        await reach(connection, ready=True)
        async with pausing(watching(connection), LOST) as pause:
            for _ in range(100):
                await asyncio.sleep(0)
            assert not pause.done()


async def test_connections_that_do_not_last_shorten_every_second_pause(outages: Outages) -> None:
    """A server that dies on each call would use up all retries within seconds."""
    async with asyncio.timeout(30), channel(outages.address) as connection:
        await reach(connection, ready=True)
        backoff = watching(connection)
        async with pausing(backoff, LOST) as pause:
            await restart(outages, connection)
            await pause
        async with pausing(backoff, LOST) as pause:
            await restart(outages, connection)
            assert not pause.done()
        backoff.reset()
        async with pausing(backoff, LOST) as pause:
            await restart(outages, connection)
            await pause


async def test_load_continues_when_the_server_is_back(outages: Outages) -> None:
    """Its last row is read during the outage; each row is stored once."""
    is_away = asyncio.Event()

    async def users() -> AsyncIterator[User]:
        for number in range(10):
            yield User(email=f"{number}@example.org")
        await is_away.wait()
        yield User(email="last@example.org")

    async with asyncio.timeout(60), channel(outages.address) as connection:
        loader = BulkLoader(
            UserServiceStub(connection).BulkCreateUsers,
            BulkCreateUsersRequest,
            BulkOptions(load_id="staff"),
            batch_rows=10,
            first_pause_seconds=NEVER,
            connection=connection,
        )
        async with aclosing(loader.run(users())) as events:
            while not isinstance(await anext(events), BulkAck):
                pass
            rest = asyncio.create_task(_last(events))
            await outages.stop()
            await reach(connection, ready=False)
            is_away.set()
            await outages.start()
            summary = await rest

    assert isinstance(summary, BulkSummary)
    assert (summary.created, summary.failed) == (11, 0)


async def _last(events: AsyncIterator[object]) -> object:
    event: object = None
    async for event in events:  # noqa: B007 - the last one is returned
        pass
    return event
