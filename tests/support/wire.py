"""Any bytes to any RPC: what the stubs would never send."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from service import services

RPCS: dict[str, MethodDescriptor] = {method.name: method for method in services.RPCS.values()}
TIMEOUT_SECONDS = 20


def message_bytes(rpc: str, message: Mapping[str, Any] | Message | bytes) -> bytes:
    """Return one message of an RPC, given as its fields, as itself or as bytes already."""
    if isinstance(message, bytes):
        return message
    if isinstance(message, Message):
        return message.SerializeToString()
    return GetMessageClass(RPCS[rpc].input_type)(**message).SerializeToString()


class Wire:
    """A client of all services; on the wire all kinds of calls are streams.

    It is the blocking one in a thread: where the server ends a call while grpc.aio's client still writes,
    that says INTERNAL in place of the server's status.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    async def call(self, rpc: str, *messages: Mapping[str, Any] | Message | bytes) -> list[Any]:
        """Return everything that the RPC answers; raises RpcError."""
        method = RPCS[rpc]
        stream: Any = self.channel.stream_stream(
            f"/{method.containing_service.full_name}/{rpc}",
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        sent = [message_bytes(rpc, message) for message in messages]
        return await asyncio.to_thread(lambda: list(stream(iter(sent), timeout=TIMEOUT_SECONDS)))
