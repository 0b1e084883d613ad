"""Calls with any bytes, including those that the stubs would never send."""

import asyncio
from collections.abc import Mapping
from itertools import islice
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from service import services

RPCS: dict[str, MethodDescriptor] = {method.name: method for method in services.RPCS.values()}
TIMEOUT_SECONDS = 20


def message_bytes(rpc: str, message: Mapping[str, Any] | Message | bytes) -> bytes:
    """Return the bytes of a message of an RPC, given as fields, message or bytes."""
    if isinstance(message, bytes):
        return message
    if isinstance(message, Message):
        return message.SerializeToString()
    return GetMessageClass(RPCS[rpc].input_type)(**message).SerializeToString()


class Wire:
    """A client of all services that calls every RPC as a stream.

    It uses the blocking client in a thread. If the server ends a call while the client still writes, that
    of grpc.aio reports INTERNAL instead of the status.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    async def call(self, rpc: str, *messages: Mapping[str, Any] | Message | bytes) -> list[Any]:
        """Return all responses of the RPC, of a watch the first one; raises RpcError."""
        method = RPCS[rpc]
        stream: Any = self.channel.stream_stream(
            f"/{method.containing_service.full_name}/{rpc}",
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        sent = [message_bytes(rpc, message) for message in messages]
        return await asyncio.to_thread(_responses, stream(iter(sent), timeout=TIMEOUT_SECONDS), rpc)


def _responses(call: Any, rpc: str) -> list[Any]:
    if not rpc.startswith("Watch"):
        return list(call)
    first = list(islice(call, 1))
    call.cancel()  # it has no end
    return first
