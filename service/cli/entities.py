"""What can be loaded and exported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from roster.v1 import posts_pb2, resources_pb2, users_pb2
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.users_pb2_grpc import UserServiceStub

IDENTITY = ("id", "version")
RESTORED = ("id", "created_at", "updated_at", "version")


@dataclass(frozen=True)
class Entity:
    """A kind of rows: its message, its RPCs, and the fields that files have."""

    name: str
    message: type[Message]
    requests: Any
    stub: Callable[..., Any]
    loaded: Sequence[str]
    exported: Sequence[str]

    def columns(self, operation: str, masked: Sequence[str]) -> Sequence[str]:
        """Return what is read of a row to `create`, `update` or `restore`."""
        if operation == "update":
            return (*IDENTITY, *(name for name in self.loaded if name in masked or "*" in masked))
        return (*RESTORED, *self.loaded) if operation == "restore" else self.loaded
