"""Writes rows as the wire bytes of messages, without building the messages.

The bytes are those that protobuf itself writes: https://protobuf.dev/programming-guides/encoding/. A page of
rows is encoded column by column, where possible with functions of C that take a whole column. Until a page is
complete its bytes are text, with a character below U+0100 for each: short texts are joined faster than bytes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from operator import add
from typing import Any, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.v1.bulk_pb2 import BulkAck

VARINT, LENGTH_DELIMITED = 0, 2  # wire types
VARINTS = re.compile("[\x80-\xff]*[\0-\x7f]")  # the last byte of each has no eighth bit
SECONDS, NANOS = "\x08", "\x10"  # the tags in a Timestamp
MAX_KNOWN_LENGTH = 2000

Encoded: TypeAlias = str
Values: TypeAlias = Sequence[Any]  # of a column
Encode = Callable[[Values], Iterable[Encoded]]


class RowEncoder:
    """Encodes rows with columns of these names, in this order, as messages.

    A column has integers, booleans, texts, or times as microseconds since 1970; None is an unset field. Rows
    may have further columns. Raises TypeError for a field of another type.

    A page of 1000 rows takes 0.4 of the time of messages, 0.9 if their times all differ. Below 40 rows,
    messages are faster.
    """

    def __init__(self, names: Sequence[str], message: type[Message]) -> None:
        self._message = message.DESCRIPTOR
        fields: list[Any] = [self._message.fields_by_name[name] for name in names]
        # Protobuf writes fields in the order of their numbers.
        self._positions = sorted(range(len(names)), key=lambda position: fields[position].number)
        self._encoders = [_encoder(fields[position]) for position in self._positions]

    def response(self, rows: Sequence[Iterable[Any]], rest: Message) -> bytes:
        """Return the bytes of a response: the rows in its repeated field, and its other fields."""
        prefixes = _prefixes_in(rest.DESCRIPTOR, self._message)
        messages = [prefixes[len(message)] + message for message in self._encode(rows)]
        return "".join(messages).encode("latin-1") + rest.SerializeToString()

    def _encode(self, rows: Sequence[Iterable[Any]]) -> Iterable[Encoded]:
        columns = list(zip(*rows, strict=True))
        if not columns:
            return []
        parts = zip(self._positions, self._encoders, strict=True)
        fields = [encode(columns[position]) for position, encode in parts]
        return map("".join, zip(*fields, strict=True))


class _Prefixes(dict[int, Encoded]):
    """The tag and the length before a text or a message, by length."""

    def __init__(self, field: FieldDescriptor) -> None:
        super().__init__()
        self._tag = _tag(field, LENGTH_DELIMITED)

    def __missing__(self, length: int) -> Encoded:
        [varint] = _varints([length])
        prefix = self._tag + varint
        if length <= MAX_KNOWN_LENGTH:
            self[length] = prefix
        return prefix


@lru_cache
def _prefixes_in(response: Descriptor, message: Descriptor) -> _Prefixes:
    """Return the prefixes of messages in a response, which has one repeated field of them."""
    [field] = [field for field in response.fields if field.message_type is message]
    return _Prefixes(field)


def _encoder(field: FieldDescriptor) -> Encode:
    """Return the function that encodes the values of a field, as "" where it is unset."""
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            unset = None if field.has_presence else ""
            return partial(_texts, _Prefixes(field), unset)
        case FieldDescriptor.TYPE_INT64:
            encode = partial(_integers, _tag(field, VARINT))
        case FieldDescriptor.TYPE_BOOL:
            encode = partial(_booleans, _tag(field, VARINT))
        case FieldDescriptor.TYPE_MESSAGE if field.message_type is Timestamp.DESCRIPTOR:
            encode = partial(_timestamps, _Prefixes(field))
        case _:
            raise TypeError(f"{field.full_name} has a type that can't be encoded")
    return partial(_distinct, encode, None if field.has_presence else 0)


def _distinct(encode: Encode, unset: int | None, values: Values) -> Iterable[Encoded]:
    """Encode each value once if many are equal: times of a load, versions, booleans, authors."""
    distinct = set(values)
    if len(distinct) > len(values) // 2 and all(values):
        return encode(values)
    known = list(distinct - {None, unset})
    encoded = dict(zip(known, encode(known), strict=True)) | {None: "", unset: ""}
    return map(encoded.__getitem__, values)


def _texts(prefixes: _Prefixes, unset: str | None, texts: Values) -> Iterable[Encoded]:
    if not all(map(str.isascii, filter(None, texts))):
        texts = [text and text.encode().decode("latin-1") for text in texts]
    if all(texts):
        return map(add, map(prefixes.__getitem__, map(len, texts)), texts)
    empty = {"": prefixes[0], None: "", unset: ""}
    return [prefixes[len(text)] + text if text else empty[text] for text in texts]


def _integers(tag: Encoded, numbers: Values) -> Iterable[Encoded]:
    return [tag + varint for varint in _varints(numbers)]


def _booleans(tag: Encoded, values: Values) -> Iterable[Encoded]:
    return [f"{tag}\1" if value else f"{tag}\0" for value in values]


def _timestamps(prefixes: _Prefixes, moments: Values) -> Iterable[Encoded]:
    seconds = _distinct(partial(_integers, SECONDS), 0, [moment // 1_000_000 for moment in moments])
    nanos = _distinct(partial(_integers, NANOS), 0, [moment % 1_000_000 * 1000 for moment in moments])
    return [prefixes[len(encoded)] + encoded for encoded in map(add, seconds, nanos)]


def _varints(numbers: Values) -> list[Encoded]:
    """Return numbers as varints: protobuf writes them as one packed field, which is cut."""
    packed = BulkAck(ids=numbers).SerializeToString().decode("latin-1")
    return VARINTS.findall(packed)[2:]  # after the field's tag and length


def _tag(field: FieldDescriptor, wire_type: int) -> Encoded:
    [tag] = _varints([field.number << 3 | wire_type])
    return tag
