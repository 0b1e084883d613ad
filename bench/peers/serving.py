"""Serves a servicer on grpc.aio and uvloop, for the peers in Python."""

import gc
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import grpc
import uvloop

from roster.v1.users_pb2_grpc import UserServiceServicer, add_UserServiceServicer_to_server

Opens = Callable[[], AbstractAsyncContextManager[UserServiceServicer]]


async def _serve(opens: Opens) -> None:
    async with opens() as servicer:
        server = grpc.aio.server()
        add_UserServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        gc.freeze()
        print(f"listening on 127.0.0.1:{port}", file=sys.stderr, flush=True)
        await server.wait_for_termination()


def serve(opens: Opens) -> None:
    """Serve the servicer that a context manager yields, on a free port."""
    uvloop.run(_serve(opens))
