"""Parsing of requests, without the resources that are nested in resources.

`User.posts` and `Post.author` are output only. A message of 4 MiB can contain two million empty posts,
each of which takes 100 bytes once it is parsed. The message types here lack these fields:
they remain bytes.
"""

from functools import cache
from typing import TypeVar

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from roster.errors import MalformedMessage

PACKAGE = "roster.v1."
RESOURCES = "roster/v1/resources.proto"

MessageT = TypeVar("MessageT", bound=Message)

_pool = DescriptorPool()


def request_class(message: type[Message]) -> type[Message]:
    """Return the class to parse in place of a generated class of the contract; return others unchanged."""
    if not message.DESCRIPTOR.full_name.startswith(PACKAGE):
        return message
    _add(message.DESCRIPTOR.file)
    return GetMessageClass(_pool.FindMessageTypeByName(message.DESCRIPTOR.full_name))


def parse(sent: type[MessageT], message: bytes) -> MessageT:
    """Parse a message; raises MalformedMessage."""
    try:
        return sent.FromString(message)
    except DecodeError:
        raise MalformedMessage(
            f"the bytes are not a {sent.DESCRIPTOR.full_name}: truncated, not UTF-8, or nested too deep"
        ) from None


@cache
def _add(file: FileDescriptor) -> None:
    for dependency in file.dependencies:
        _add(dependency)
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    if file.name == RESOURCES:
        for message in proto.message_type:
            _drop_resources(message)
    _pool.AddSerializedFile(proto.SerializeToString())


def _drop_resources(message: DescriptorProto) -> None:
    kept = [field for field in message.field if not _is_resource(field)]
    del message.field[:]
    message.field.extend(kept)


def _is_resource(field: FieldDescriptorProto) -> bool:
    return field.type == field.TYPE_MESSAGE and field.type_name.startswith(f".{PACKAGE}")
