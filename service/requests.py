"""Requests as the server parses them: without the resources inside resources.

`User.posts` and `Post.author` are output only. A message of 4 MiB can hold two million empty posts, each
of which takes 100 bytes once it is parsed. The types here do not have these fields, so that they stay the
bytes they came as.
"""

from functools import cache
from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from service.errors import MalformedMessage

PACKAGE = "roster.v1."
RESOURCES = "roster/v1/resources.proto"

_pool = DescriptorPool()


def request_class(message: type[Message]) -> Any:
    """Return the class that parses what a generated class of the contract would; another class itself."""
    if not message.DESCRIPTOR.full_name.startswith(PACKAGE):
        return message
    _add(message.DESCRIPTOR.file)
    return GetMessageClass(_pool.FindMessageTypeByName(message.DESCRIPTOR.full_name))


def parse(sent: type[Message], message: bytes) -> Any:
    """Return a message of a class; raises MalformedMessage."""
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
