"""Rows of files, the entities they are of, and their values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from types import ModuleType
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.errors import RosterError
from roster.v1 import posts_pb2, users_pb2
from roster.v1.bulk_pb2 import RowFailure
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2_grpc import UserServiceStub

OriginalT = TypeVar("OriginalT")
Values: TypeAlias = Mapping[str, Any]  # the values of a row, by column


@dataclass(frozen=True)
class Entity:
    """An entity: its message, its RPCs, and the columns of its files.

    `keys` are columns whose values can't be taken for names of columns. `status` is the column that other
    systems have under other words, such as `enabled`, or as the opposite. `refused` are columns that the
    server refuses, with a sentence of its own.
    """

    name: str
    message: type[Message]
    key: type[Message]
    requests: ModuleType
    stub: Callable[[grpc.aio.Channel], Any]
    loaded: Sequence[str]
    exported: Sequence[str]
    keys: Sequence[str]
    status: str | None = None
    refused: Sequence[str] = ()
    alternatives: Sequence[str] = ()

    def keyed(self) -> "Entity":
        """Return the entity of files whose rows are only keys."""
        fields = self.key.DESCRIPTOR.fields_by_name
        alternatives = [field.name for field in fields.values() if field.containing_oneof]
        return replace(self, message=self.key, status=None, refused=(), alternatives=alternatives)

    def columns(self, operation: str, masked: Sequence[str]) -> Sequence[str]:
        """Return the columns that an operation reads; the key of a `mirror` by id is one more."""
        if operation == "delete":
            return [*self.key.DESCRIPTOR.fields_by_name]
        if operation in ("create", "mirror"):
            return (*self.loaded, *self.refused)
        if operation == "restore":
            return (*RESTORED, *self.loaded, *self.refused)
        updated = [name for name in (*self.loaded, *self.refused) if name in masked or "*" in masked]
        return ("id", "version", *updated)

    @property
    def times(self) -> Sequence[str]:
        """The exported columns that are times."""
        fields = self.message.DESCRIPTOR.fields_by_name
        return [name for name in self.exported if fields[name].message_type is Timestamp.DESCRIPTOR]

    def rpc(self, connection: grpc.aio.Channel, verb: str) -> tuple[Any, Any]:
        """Return the RPC of a verb such as `Export`, and its request type."""
        name = f"{verb}{self.name.title()}"
        return getattr(self.stub(connection), name), getattr(self.requests, f"{name}Request")


RESTORED = ("id", "created_at", "updated_at", "version")
USERS = Entity(
    "users",
    User,
    users_pb2.UserKey,
    users_pb2,
    UserServiceStub,
    loaded=("email", "full_name", "is_active", "hashed_password"),
    exported=("id", "email", "full_name", "is_active", *RESTORED[1:]),
    keys=("email", "id"),
    status="is_active",
    refused=("password",),
)
POSTS = Entity(
    "posts",
    Post,
    posts_pb2.PostKey,
    posts_pb2,
    PostServiceStub,
    loaded=("title", "content", "author_id", "author_email"),
    exported=("id", "title", "content", "author_id", *RESTORED[1:]),
    keys=("id", "author_id", "author_email"),
)
ENTITIES = {"users": USERS, "posts": POSTS}


class SourceError(Exception):
    """The file as a whole can't be read."""


@dataclass(slots=True)
class Row(Generic[OriginalT]):
    """A row of a file. Once it is parsed, it has a message, or the reason why there is none.

    `number` is the number of its first line, from 1; `size` is in bytes, approximately. `original` is the
    row as it is in the file, and `parser` returns its message or raises RosterError.
    """

    number: int
    size: int
    original: OriginalT
    parser: Callable[[OriginalT], Message]
    message: Message | None = None
    failure: RowFailure | None = None

    def parse(self) -> None:
        """Set the message or the failure."""
        try:
            self.message = self.parser(self.original)
        except RosterError as error:
            self.failure = RowFailure(reason=error.reason, field=error.field, message=error.message)


def columns_of(messages: Sequence[Any], names: Sequence[str]) -> Mapping[str, list[Any]]:
    """Return the values of fields, by name: None where one is unset, times as microseconds since 1970."""
    return {name: _column(messages, name) for name in names}


def _column(messages: Sequence[Any], name: str) -> list[Any]:
    values = list(map(attrgetter(name), messages))
    if values and isinstance(values[0], Timestamp):
        return [moment.seconds * 1_000_000 + moment.nanos // 1000 for moment in values]
    if all(values) or not messages[0].DESCRIPTOR.fields_by_name[name].has_presence:
        return values
    pairs = zip(values, messages, strict=True)
    return [value if value or message.HasField(name) else None for value, message in pairs]
