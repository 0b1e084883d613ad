"""The messages of a bulk stream; their size is checked before they are parsed."""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from roster.errors import InvalidOptions
from service.requests import parse, request_class

MAX_ROWS = 5000
MAX_BYTES = 4 << 20

LENGTH_DELIMITED = 2  # https://protobuf.dev/programming-guides/encoding/#structure
# An empty row has 2 bytes on the wire and 100 once it is parsed: 4 MiB of them would take 200 MiB.
# A message in which the byte of a row's tag is rarer than this is parsed without counting its fields. The
# byte occurs in texts and lengths, too, so the limit is larger than that of rows.
MAX_TAGS = 4 * MAX_ROWS
MAX_FIELDS = MAX_ROWS + 16  # the rows and all other fields of a message
MAX_OPTIONS_BYTES = 64 << 10
OPTIONS_TAG = 1 << 3 | LENGTH_DELIMITED


@dataclass(frozen=True)
class BulkMessage:
    """A message of a bulk stream. If it is too large, it has no rows, and `size` is at least 1."""

    request: Any
    size: int
    is_too_large: bool = False


class BulkParser:
    """Parses the messages of one bulk RPC."""

    def __init__(self, generated: type[Message], rows_field: str) -> None:
        self._class = request_class(generated)
        self._rows_field = rows_field
        self._tag = self._class.DESCRIPTOR.fields_by_name[rows_field].number << 3 | LENGTH_DELIMITED

    def parse(self, message: bytes) -> BulkMessage:
        """Parse a message; raises MalformedMessage, and InvalidOptions if the options are too large."""
        # Counting bytes is fast, and enough for nearly all messages. Only others are walked field by field.
        is_small = len(message) <= MAX_BYTES and max(map(message.count, (self._tag, OPTIONS_TAG))) <= MAX_TAGS
        if is_small or not self._is_too_large(message):
            request = parse(self._class, message)
            size = len(getattr(request, self._rows_field))
            if size <= MAX_ROWS:
                return BulkMessage(request, size)
        # Parse what comes before the rows, so that the error is reported at the message's offset.
        head, fields = self._walk(message)
        return BulkMessage(parse(self._class, message[:head]), max(fields, 1), is_too_large=True)

    def _is_too_large(self, message: bytes) -> bool:
        _, fields = self._walk(message)
        return len(message) > MAX_BYTES or fields > MAX_FIELDS

    def _walk(self, message: bytes) -> tuple[int, int]:
        """Return the position of the first row, and the number of fields, MAX_FIELDS + 1 at most."""
        position, head, fields, end = 0, len(message), 0, len(message)
        while position < end and fields <= MAX_FIELDS:
            start, tag = position, message[position]
            position = _skip(message, position)
            fields += 1
            if tag == OPTIONS_TAG and position - start > MAX_OPTIONS_BYTES:
                raise InvalidOptions(f"options may have at most {MAX_OPTIONS_BYTES:,} bytes", field="options")
            if tag == self._tag:
                head = min(head, start)
        return head, fields


def _skip(message: bytes, position: int) -> int:
    """Return the end of the field at a position; the end of the message if it is malformed."""
    tag, position = _varint(message, position)
    match tag & 7:
        case 0:
            return _varint(message, position)[1]
        case 1:
            return position + 8
        case 2:
            size, position = _varint(message, position)
            return position + size
        case 5:
            return position + 4
    return len(message)  # a group, which no message of the contract has


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    number = shift = 0
    for byte in message[position : position + 10]:
        number |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        if byte < 0x80:  # noqa: PLR2004 - the last byte
            return number, position
    return number, len(message)
