"""Rows of files: the columns of each entity, and conversion between values and messages."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.v1 import posts_pb2, users_pb2
from roster.v1.bulk_pb2 import RowFailure
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2_grpc import UserServiceStub
from service.errors import InvalidField, RosterError, TooLarge

OriginalT = TypeVar("OriginalT")
Values: TypeAlias = Mapping[str, Any]  # the values of a row, by column

# The server accepts rows with up to 1 MiB of content.
MAX_ROW_BYTES = 2 << 20
MAX_IGNORED_NAMES = 100

INTEGER = re.compile(r"-?[0-9]{1,19}")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
ERROR = "_error"


@dataclass(frozen=True)
class Entity:
    """An entity: its message, its RPCs, and the columns of its files."""

    name: str
    message: type[Message]
    requests: ModuleType
    stub: Callable[[grpc.aio.Channel], Any]
    loaded: Sequence[str]
    exported: Sequence[str]

    def columns(self, operation: str, masked: Sequence[str]) -> Sequence[str]:
        """Return the columns that `create`, `update` or `restore` reads."""
        if operation == "create":
            return self.loaded
        if operation == "restore":
            return (*RESTORED, *self.loaded)
        updated = [name for name in self.loaded if name in masked or "*" in masked]
        return ("id", "version", *updated)

    def rpc(self, connection: grpc.aio.Channel, verb: str) -> tuple[Any, Any]:
        """Return the RPC of a verb such as `Export`, and its request type."""
        name = f"{verb}{self.name.title()}"
        return getattr(self.stub(connection), name), getattr(self.requests, f"{name}Request")


RESTORED = ("id", "created_at", "updated_at", "version")
USERS = Entity(
    "users",
    User,
    users_pb2,
    UserServiceStub,
    loaded=("email", "full_name", "is_active", "hashed_password", "password"),
    exported=("id", "email", "full_name", "is_active", *RESTORED[1:]),
)
POSTS = Entity(
    "posts",
    Post,
    posts_pb2,
    PostServiceStub,
    loaded=("title", "content", "author_id", "author_email"),
    exported=("id", "title", "content", "author_id", *RESTORED[1:]),
)
ENTITIES = {"users": USERS, "posts": POSTS}


@dataclass(slots=True)
class Row:
    """A row of a file: its message, or the reason why it could not be read.

    `number` is the number of its first line, from 1; `size` is in bytes. `original` is the row as it is in
    the file: bytes, or a dict of values for Parquet.
    """

    number: int
    size: int
    original: Any
    message: Message | None = None
    failure: RowFailure | None = None

    @classmethod
    def parse(
        cls, number: int, size: int, original: OriginalT, parser: Callable[[OriginalT], Message]
    ) -> "Row":
        """Return a row with the message that `parser` returns, or the failure that it raises."""
        try:
            return cls(number, size, original, parser(original))
        except RosterError as error:
            failure = RowFailure(reason=error.reason, field=error.field, message=error.message)
            return cls(number, size, original, failure=failure)


class Columns:
    """Maps the columns of a file to fields; `ignored` collects the names of unknown columns."""

    def __init__(self, message: type[Message], names: Sequence[str]) -> None:
        self.names = names
        self.ignored: dict[str, None] = {}
        self._message = message
        self._types = {name: message.DESCRIPTOR.fields_by_name[name].type for name in names}

    def to_message(self, fields: Values) -> Message:
        """Return the message of a row; raises InvalidField, TooLarge.

        An empty value is unset, unless the field is a string.
        """
        values = {}
        for name, value in fields.items():
            if name not in self._types:
                self._ignore(name)
            elif value is not None and (value != "" or self._types[name] == FieldDescriptor.TYPE_STRING):
                values[name] = PARSERS[self._types[name]](name, value)
        message = self._message(**values)
        if message.ByteSize() > MAX_ROW_BYTES:
            raise TooLarge(f"the row is larger than {MAX_ROW_BYTES >> 20} MiB")
        return message

    def _ignore(self, name: str) -> None:
        if name != ERROR and len(self.ignored) < MAX_IGNORED_NAMES:
            self.ignored[name] = None


def values_of(message: Any, names: Sequence[str]) -> Values:
    """Return the values of a message's fields, None for unset ones."""
    values = {}
    for name in names:
        value = getattr(message, name)
        if not value and message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name):
            value = None
        values[name] = value.ToDatetime(UTC) if isinstance(value, Timestamp) else value
    return values


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise InvalidField(f"{name} must be a string", field=name)


def _integer(name: str, value: Any) -> int:
    # As in protobuf's JSON, a string of digits is an integer too.
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
        return value
    raise InvalidField(f"{name} must be an integer of at most 64 bits", field=name)


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    raise InvalidField(f"{name} must be true or false", field=name)


def _timestamp(name: str, value: Any) -> datetime:
    with suppress(TypeError, ValueError, OverflowError):
        time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if time.tzinfo:
            return time.astimezone(UTC)
    raise InvalidField(f"{name} must be an RFC 3339 time with a time zone", field=name)


PARSERS: Mapping[int, Callable[[str, Any], Any]] = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_INT64: _integer,
    FieldDescriptor.TYPE_BOOL: _boolean,
    FieldDescriptor.TYPE_MESSAGE: _timestamp,
}
