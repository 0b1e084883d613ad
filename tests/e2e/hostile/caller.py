"""A caller in its own process, so that attacks in the tests' process do not slow it down.

Reads one user every 20 ms until its standard input ends, then prints the durations of the calls as JSON.
"""

import asyncio
import json
import sys
from pathlib import Path
from time import perf_counter

import grpc

from roster.client import tls_credentials
from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub

PAUSE_SECONDS = 0.02


async def read(address: str, ca: bytes, token: str, id: str) -> None:
    """Read the user until standard input ends."""
    seconds: list[float] = []
    failures: list[str] = []
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    credentials = tls_credentials(ca, token=lambda: token)
    async with grpc.aio.secure_channel(address, credentials) as channel:
        users = UserServiceStub(channel)
        while not ended.done():
            began = perf_counter()
            try:
                await users.GetUser(GetUserRequest(id=int(id)), timeout=10)
            except grpc.aio.AioRpcError as error:
                failures.append(f"{error.code().name}: {error.details()}")
            seconds.append(perf_counter() - began)
            if len(seconds) == 1:
                print("ready", flush=True)  # noqa: T201
            await asyncio.wait([ended], timeout=PAUSE_SECONDS)
    print(json.dumps({"seconds": seconds, "failures": failures}))  # noqa: T201


if __name__ == "__main__":
    asyncio.run(read(sys.argv[1], Path(sys.argv[2]).read_bytes(), sys.argv[3], sys.argv[4]))
