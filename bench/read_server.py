"""Roster's server with two more RPCs that use the same interceptors: a no-op, and a textbook GetUser.

Both take a GetUserRequest. The no-op is the maximum that grpc.aio allows; the textbook GetUser is the usual
way to write it. On a second port, UserService runs without interceptors.
"""

import asyncio
import gc
import os
import sys
from typing import Any

import grpc
import uvloop
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from roster.v1.resources_pb2 import User as UserMessage
from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import add_UserServiceServicer_to_server
from service import logs
from service.server import OPTIONS, Server
from service.settings import Settings
from service.users.model import User
from service.users.servicer import UserServicer

SERVICE = "roster.bench.Reference"


async def no_op(request: GetUserRequest, context: Any) -> Empty:  # noqa: ARG001
    """Return an empty answer."""
    return Empty()


class Textbook:
    """The usual GetUser: a session and an ORM select for each call."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def get(self, request: GetUserRequest, context: Any) -> UserMessage:  # noqa: ARG002
        async with self.sessions() as session:
            user = (await session.execute(select(User).where(User.id == request.id))).scalar_one()
        created_at, updated_at = Timestamp(), Timestamp()
        created_at.FromDatetime(user.created_at)
        updated_at.FromDatetime(user.updated_at)
        return UserMessage(
            id=user.id,
            email=user.email,
            full_name=user.full_name,
            is_active=user.is_active,
            created_at=created_at,
            updated_at=updated_at,
            version=user.version,
        )


def references(settings: Settings) -> grpc.GenericRpcHandler:
    """Return a service with both RPCs."""
    engine = create_async_engine(
        settings.database_url, pool_size=settings.pool_size, max_overflow=settings.max_overflow
    )
    behaviours = {"NoOp": (no_op, Empty), "Textbook": (Textbook(engine).get, UserMessage)}
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            behaviour,
            request_deserializer=GetUserRequest.FromString,
            response_serializer=answer.SerializeToString,
        )
        for name, (behaviour, answer) in behaviours.items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


async def main() -> None:
    settings = Settings()
    server = Server(settings)
    server.server.add_generic_rpc_handlers((references(settings),))
    bare = grpc.aio.server(options=OPTIONS)
    users = UserServicer(server.database, server.users, server.passwords, server.bulk)
    add_UserServiceServicer_to_server(users, bare)
    port = bare.add_insecure_port("127.0.0.1:0")
    await server.start()
    await bare.start()
    gc.freeze()
    gc.set_threshold(20_000)  # as `roster serve` does
    print(f"listening on {server.address} 127.0.0.1:{port}", file=sys.stderr, flush=True)
    if "--lines" in sys.argv:  # the lines are written to /dev/null
        logs.configure("INFO", "json")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    await asyncio.Event().wait()


if __name__ == "__main__":
    if "--asyncio" in sys.argv:
        asyncio.run(main())
    else:
        uvloop.run(main())
