"""Clients of the change feed, as workers: idle watchers, one that measures latencies, one that catches up."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc

from roster.v1.changes_pb2 import ListChangesRequest, WatchChangesRequest, WatchChangesResponse
from roster.v1.changes_pb2_grpc import ChangeServiceStub

CHANNELS = 10
PAUSE_SECONDS = 0.037  # not a divisor of the server's interval
CHANGE = "UPDATE users SET version = version + 1 WHERE id = $1"
WATCH = "/roster.v1.ChangeService/WatchChanges"


def idle(watchers: str, seconds: str, address: str) -> Callable[[], Any]:
    """Open watches, and read them for some seconds; the result is the number of responses."""

    async def watch() -> int:
        async with _channels(address) as channels:
            calls = [_raw(channels[number % CHANNELS]) for number in range(int(watchers))]
            await asyncio.gather(*(call.read() for call in calls))
            print("watching", flush=True)
            tasks = [asyncio.create_task(_count(call)) for call in calls]
            await asyncio.sleep(float(seconds))
            for call in calls:
                call.cancel()
            return sum(await asyncio.gather(*tasks))

    return lambda: asyncio.run(watch())


def latency(database: str, count: str, address: str) -> Callable[[], Any]:
    """Change rows one after the other; the result has the median and p99 of the seconds from each commit."""

    async def measure() -> dict[str, float]:
        connection = await asyncpg.connect(database)
        async with grpc.aio.insecure_channel(address) as channel:
            call = ChangeServiceStub(channel).WatchChanges(WatchChangesRequest())
            await call.read()
            times = []
            for number in range(int(count)):
                await connection.execute(CHANGE, number % 1000 + 1)
                committed = time.perf_counter()
                response: Any = await call.read()
                while not response.changes:
                    response = await call.read()
                times.append(time.perf_counter() - committed)
                await asyncio.sleep(PAUSE_SECONDS)
            call.cancel()
        await connection.close()
        times.sort()
        return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}

    return lambda: asyncio.run(measure())


def catch_up(file: str, rows: str, address: str) -> Callable[[], Any]:
    """Watch from the token in a file until there were as many changes as rows; the result is their number."""
    request = WatchChangesRequest(token=Path(file).read_text())

    async def watch() -> int:
        changes = 0
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = ChangeServiceStub(channel).WatchChanges(request)
            while changes < int(rows):
                changes += len((await call.read()).changes)
            call.cancel()
        return changes

    return lambda: asyncio.run(watch())


def current_token(address: str) -> str:
    """Return the current position of the feed."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/roster.v1.ChangeService/ListChanges",
            request_serializer=ListChangesRequest.SerializeToString,
            response_deserializer=WatchChangesResponse.FromString,
        )
        return str(call(ListChangesRequest()).token)


async def _count(call: Any) -> int:
    responses = 0
    try:
        while await call.read() is not grpc.aio.EOF:
            responses += 1
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass
    return responses


def _raw(channel: Any) -> Any:
    """Open a watch whose responses are not parsed: the client has better things to do."""
    return channel.unary_stream(WATCH)(WatchChangesRequest().SerializeToString())


@asynccontextmanager
async def _channels(address: str) -> AsyncIterator[list[Any]]:
    # Channels with the same arguments share a connection.
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]
    yield channels
    for channel in channels:
        await channel.close()
