"""A GetUser that does nothing: the most that grpc.aio and uvloop allow."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bench.peers.serving import serve
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceServicer


class NoOp(UserServiceServicer):
    async def GetUser(self, request: GetUserRequest, context: Any) -> User:
        return User()


@asynccontextmanager
async def open_nothing() -> AsyncIterator[NoOp]:
    yield NoOp()


if __name__ == "__main__":
    serve(open_nothing)
