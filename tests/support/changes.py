"""Clients of the change feed, and tokens that no server makes."""

import asyncio
import json
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from typing import Any

import grpc

from roster.v1.changes_pb2 import Change, WatchChangesRequest, WatchChangesResponse
from roster.v1.changes_pb2_grpc import ChangeServiceStub
from service.changes.token import CHECKSUM_BYTES, VERSION

SECONDS = 20
# A client with these options receives no more than 64 KiB that it does not read.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


class Watch:
    """A watch of a client, which keeps a copy of what it receives, and the last token."""

    def __init__(self, channel: grpc.aio.Channel, token: str = "", entities: Iterable[Any] = ()) -> None:
        request = WatchChangesRequest(token=token, entities=[*entities])
        self.call: Any = ChangeServiceStub(channel).WatchChanges(request)
        self.token = token
        self.copy: dict[tuple[str, int], Any] = {}

    async def read(self) -> WatchChangesResponse:
        """Read the next response; raises AioRpcError at the end of the stream."""
        async with asyncio.timeout(SECONDS):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            raise EOFError("a watch has no end but an error")
        self.token = response.token
        for change in response.changes:
            apply(change, self.copy)
        return response  # type: ignore[no-any-return]

    async def changes(self, number: int) -> list[Change]:
        """Read until there are this many changes, and return them."""
        changes: list[Change] = []
        async with asyncio.timeout(SECONDS):
            while len(changes) < number:
                changes += (await self.read()).changes
        return changes

    async def end(self) -> None:
        """Read all responses; raises AioRpcError."""
        async with asyncio.timeout(SECONDS):
            while True:
                await self.read()


def apply(change: Change, copy: dict[tuple[str, int], Any]) -> None:
    """Apply a change to a copy of the rows."""
    match change.WhichOneof("change"):
        case "user":
            copy["user", change.user.id] = change.user
        case "post":
            copy["post", change.post.id] = change.post
        case "deleted_user_id":
            copy.pop(("user", change.deleted_user_id), None)
        case "deleted_post_id":
            copy.pop(("post", change.deleted_post_id), None)


def summary(change: Change) -> tuple[str, int]:
    """Return which row a change is of, and whether it was deleted."""
    kind = change.WhichOneof("change") or ""
    value = getattr(change, kind)
    return kind, value if isinstance(value, int) else value.id


def forge(*values: Any) -> str:
    """Return a token with any values and a valid checksum."""
    return encode(zlib.compress(json.dumps(values).encode()))


def encode(body: bytes, version: bytes = VERSION) -> str:
    """Return a token with any bytes and a valid checksum."""
    checksum = zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "big")
    return urlsafe_b64encode(version + checksum + body).decode().rstrip("=")
