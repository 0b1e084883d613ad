"""The messages of a bulk stream, judged by their bytes before they are parsed."""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from service.errors import InvalidOptions
from service.requests import parse, request_class

MAX_ROWS = 5000
MAX_BYTES = 4 << 20

LENGTH_DELIMITED = 2  # https://protobuf.dev/programming-guides/encoding/#structure
# An empty row has 2 bytes on the wire and 100 once it is parsed: 4 MiB of them would take 200 MiB.
# A message with fewer tags is parsed without a closer look; texts and lengths have some too.
MAX_TAGS = 4 * MAX_ROWS
MAX_FIELDS = MAX_ROWS + 16  # rows, and what else a message has
MAX_OPTIONS_BYTES = 64 << 10
OPTIONS_TAG = 1 << 3 | LENGTH_DELIMITED


@dataclass(frozen=True)
class BulkMessage:
    """A message of a bulk stream. One that is too large has none of its rows, and `size` says at least 1."""

    request: Any
    size: int
    is_too_large: bool = False


class BulkParser:
    """Parses the messages of one bulk RPC."""

    def __init__(self, generated: type[Message], rows: str) -> None:
        self._class = request_class(generated)
        self._rows = rows
        self._tag = self._class.DESCRIPTOR.fields_by_name[rows].number << 3 | LENGTH_DELIMITED

    def parse(self, message: bytes) -> BulkMessage:
        """Return a message; raises MalformedMessage, and InvalidOptions for options that are too large."""
        is_small = len(message) <= MAX_BYTES and max(map(message.count, (self._tag, OPTIONS_TAG))) <= MAX_TAGS
        if is_small or not self._is_too_large(message):
            request = parse(self._class, message)
            size = len(getattr(request, self._rows))
            if size <= MAX_ROWS:
                return BulkMessage(request, size)
        head, fields = self._walk(message)
        return BulkMessage(parse(self._class, message[:head]), max(fields, 1), is_too_large=True)

    def _is_too_large(self, message: bytes) -> bool:
        _, fields = self._walk(message)
        return len(message) > MAX_BYTES or fields > MAX_FIELDS

    def _walk(self, message: bytes) -> tuple[int, int]:
        """Return where the first row begins, and how many fields there are, MAX_FIELDS + 1 at most."""
        at, head, fields, end = 0, len(message), 0, len(message)
        while at < end and fields <= MAX_FIELDS:
            began, tag = at, message[at]
            at = _skip(message, at)
            fields += 1
            if tag == OPTIONS_TAG and at - began > MAX_OPTIONS_BYTES:
                raise InvalidOptions(f"options have at most {MAX_OPTIONS_BYTES:,} bytes", field="options")
            if tag == self._tag:
                head = min(head, began)
        return head, fields


def _skip(message: bytes, at: int) -> int:
    """Return where the field that begins at a position ends; the end of the message if it is malformed."""
    tag, at = _varint(message, at)
    match tag & 7:
        case 0:
            return _varint(message, at)[1]
        case 1:
            return at + 8
        case 2:
            size, at = _varint(message, at)
            return at + size
        case 5:
            return at + 4
    return len(message)  # a group, which no message of ours has


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number, and where it ends."""
    number = shift = 0
    for byte in message[at : at + 10]:
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:  # noqa: PLR2004 - the last byte
            return number, at
    return number, len(message)
