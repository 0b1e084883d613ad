"""The client process: it reads a workload as a line of JSON, runs it, and prints the result as another."""

import asyncio
import json
import pickle
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import uvloop

from roster.v1.users_pb2 import ExportUsersResponse

CHANNELS = 4
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each channel


class Client:
    """Several channels to each address of a server."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.channels = [
            [grpc.aio.insecure_channel(address, OPTIONS) for _ in range(CHANNELS)] for address in addresses
        ]

    async def calls(
        self, method: str, file: str, in_flight: int, seconds: float, port: int
    ) -> dict[str, float]:
        """Call a method with serialized requests, `in_flight` at a time; the latencies are in ms."""
        requests = cycle(await asyncio.to_thread(_requests, file))
        latencies: list[float] = []
        start = perf_counter()

        async def caller(call: Any) -> None:
            while (sent := perf_counter()) < start + seconds:
                await call(next(requests))
                latencies.append(perf_counter() - sent)

        calls = [channel.unary_unary(method) for channel in self.channels[port]]
        await asyncio.gather(*(caller(calls[number % CHANNELS]) for number in range(in_flight)))
        return {
            "count": len(latencies),
            "seconds": perf_counter() - start,
            "p50": _quantile(latencies, 0.5),
            "p99": _quantile(latencies, 0.99),
        }

    async def export(self, method: str, request: str) -> dict[str, float]:
        """Read a stream to its end; the rows are counted after the clock has stopped."""
        start = perf_counter()
        call = self.channels[0][0].unary_stream(method)
        messages = [message async for message in call(bytes.fromhex(request))]
        seconds = perf_counter() - start
        return {
            "count": sum(len(ExportUsersResponse.FromString(message).users) for message in messages),
            "seconds": seconds,
        }


def _requests(file: str) -> list[bytes]:
    requests: list[bytes] = pickle.loads(Path(file).read_bytes())
    return requests


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[int(part * len(values))] * 1000


async def main(addresses: Sequence[str]) -> None:
    client = Client(addresses)
    while line := await asyncio.to_thread(sys.stdin.readline):
        workload = json.loads(line)
        run = client.export if "request" in workload else client.calls
        print(json.dumps(await run(**workload)), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
