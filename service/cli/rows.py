"""Rows as NDJSON and as CSV: line <-> message, and the rejects that a load writes."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.errors import InvalidField, MalformedMessage, RosterError, TooLarge

MAX_LINE_BYTES = 8 << 20
# A row that the server could take has little more than 1 MiB of content.
MAX_ROW_BYTES = 2 << 20
SHOWN_BYTES = 1000  # of a line that is too long
MAX_IGNORED_NAMES = 100

INTEGER = re.compile(r"-?[0-9]{1,19}")
ERROR = "_error"
LINE = "_line"


class SourceError(Exception):
    """The file as a whole can't be read as rows."""


@dataclass(slots=True)
class Row:
    """A row of a file: its message, or why it has none.

    `number` is that of its first line, from 1, `size` is in bytes. `original` is a line, or cells.
    """

    number: int
    size: int
    original: Any
    message: Message | None = None
    failure: RowFailure | None = None


Parsers = Mapping[int, Callable[[str, Any], Any]]


class Columns:
    """What is read of a row; `ignored` are the names met beside."""

    def __init__(self, message: type[Message], names: Sequence[str]) -> None:
        self.names = names
        self.ignored: dict[str, None] = {}
        self._message = message
        self._types = {name: message.DESCRIPTOR.fields_by_name[name].type for name in names}

    def message(self, fields: Mapping[str, Any], parsers: Parsers) -> Message:
        """Return a row's message; raises InvalidField, TooLarge."""
        values = {}
        for name, value in fields.items():
            if name not in self._types:
                self._ignore(name)
            elif value is not None:
                values[name] = parsers[self._types[name]](name, value)
        message = self._message(**values)
        if message.ByteSize() > MAX_ROW_BYTES:
            raise TooLarge(f"the row is larger than {MAX_ROW_BYTES >> 20} MiB")
        return message

    def _ignore(self, name: str) -> None:
        if name != ERROR and len(self.ignored) < MAX_IGNORED_NAMES:
            self.ignored[name] = None


class Ndjson:
    """One JSON object a line."""

    suffix = "ndjson"

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def rows(self, lines: Iterator[bytes]) -> Iterator[Row]:
        """Yield the rows of lines that are cut behind MAX_LINE_BYTES."""
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield self._row(number, line)

    def _row(self, number: int, line: bytes) -> Row:
        row = Row(number, len(line), line)
        try:
            row.message = self._columns.message(_object(line), JSON_PARSERS)
        except RosterError as error:
            row.failure = _failure(error)
        return row

    def head(self) -> bytes:
        """Return what a file of rejects begins with."""
        return b""

    def rejected(self, row: Row, failure: RowFailure) -> bytes:
        """Return a row with why it failed."""
        why = {
            "reason": failure.reason,
            "field": failure.field,
            "message": failure.message,
            "row": row.number,
        }
        try:
            return _json_line({**_object(row.original), ERROR: why})
        except (RosterError, orjson.JSONEncodeError):  # orjson reads deeper nesting than it writes
            line = row.original if len(row.original) <= MAX_LINE_BYTES else row.original[:SHOWN_BYTES]
            return _json_line({LINE: line.rstrip(b"\r\n").decode(errors="backslashreplace"), ERROR: why})


class Csv:
    """RFC 4180 with a header line, UTF-8; an empty cell is a field that is not set.

    In rejects `_error` is the first column, so that a row with too few or too many cells stays as it was.
    """

    suffix = "csv"

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._header: list[str] = []
        self._error_index: int | None = None

    def rows(self, lines: Iterator[bytes]) -> Iterator[Row]:
        """Yield the rows of lines that are cut behind MAX_LINE_BYTES; raises SourceError for the header."""
        # A process has one limit; the default of 128 KiB is less than a post may have.
        csv.field_size_limit(MAX_LINE_BYTES)
        record = _Record(lines)
        reader = csv.reader(record, strict=True)
        self._read_header(reader)
        if not record.is_utf8:
            raise SourceError("the header line is not UTF-8")
        while True:
            record.begin()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                told = MalformedMessage(f"the row is not CSV: {error}")
                yield Row(record.number, record.size, [record.text()], failure=_failure(told))
            else:
                if cells or record.is_cut:
                    yield self._row(record, cells)

    def _read_header(self, reader: Iterator[list[str]]) -> None:
        try:
            self._header = [name.strip() for name in next(reader)]
        except (StopIteration, csv.Error):
            raise SourceError("the file has no header line, which CSV needs") from None
        if len(set(self._header)) < len(self._header):
            raise SourceError("the header line has a name twice")
        if not set(self._header) & set(self._columns.names):
            raise SourceError(f"the header line names none of {', '.join(self._columns.names)}")
        if ERROR in self._header:
            self._error_index = self._header.index(ERROR)
            self._header.remove(ERROR)

    def _row(self, record: "_Record", cells: list[str]) -> Row:
        if self._error_index is not None:
            del cells[self._error_index : self._error_index + 1]
        row = Row(record.number, record.size, [record.text()[:SHOWN_BYTES]] if record.is_cut else cells)
        try:
            row.message = self._columns.message(self._fields(record, cells), CSV_PARSERS)
        except RosterError as error:
            row.failure = _failure(error)
        return row

    def _fields(self, record: "_Record", cells: list[str]) -> dict[str, str | None]:
        if record.is_cut:
            raise _too_long()
        if not record.is_utf8:
            raise MalformedMessage("the row is not UTF-8")
        if len(cells) != len(self._header):
            raise MalformedMessage(
                f"the number of cells is {len(cells)}, in the header line {len(self._header)}"
            )
        return {name: cell or None for name, cell in zip(self._header, cells, strict=True)}

    def head(self) -> bytes:
        """Return what a file of rejects begins with."""
        return _csv_line([ERROR, *self._header])

    def rejected(self, row: Row, failure: RowFailure) -> bytes:
        """Return a row with why it failed."""
        where = f"{failure.reason} {failure.field}".rstrip()
        return _csv_line([f"{where}: {failure.message}", *row.original])


FileFormat = Ndjson | Csv


class _Record:
    """Lines for csv.reader, and those of them that it has taken for one record."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._taken: list[str] = []
        self._line_number = 0
        self.begin()

    def begin(self) -> None:
        self._taken.clear()
        self.number = self._line_number + 1
        self.size = 0
        self.is_utf8 = True
        self.is_cut = False

    def text(self) -> str:
        return "".join(self._taken).rstrip("\r\n")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._line_number += 1
        self.size += len(line)
        text = self._decoded(line)
        self._taken.append(text)
        if len(line) > MAX_LINE_BYTES:
            self.is_cut = True
            return "\n"  # a quote that was cut off would swallow the rows behind it
        return text

    def _decoded(self, line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.is_utf8 = False
            return line.decode(errors="surrogateescape")


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _too_long()
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"the line is not JSON: {error.msg}, at column {error.colno:,}") from None
    if not isinstance(value, dict):
        raise MalformedMessage("the line is JSON, but not an object")
    return value


def _failure(error: RosterError) -> RowFailure:
    return RowFailure(reason=error.reason, field=error.field, message=error.message)


def _too_long() -> TooLarge:
    return TooLarge(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")


def _json_line(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def _csv_line(cells: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode(errors="surrogateescape")


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise InvalidField(f"{name} must be a text", field=name)


def _integer(name: str, value: Any) -> int:
    # As in protobuf's JSON, a text of digits is an integer too.
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
        return value
    raise InvalidField(f"{name} must be an integer of at most 64 bits", field=name)


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidField(f"{name} must be true or false", field=name)


def _boolean_cell(name: str, value: str) -> bool:
    return _boolean(name, {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value))


JSON_PARSERS: Parsers = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_INT64: _integer,
    FieldDescriptor.TYPE_BOOL: _boolean,
}
CSV_PARSERS: Parsers = {**JSON_PARSERS, FieldDescriptor.TYPE_BOOL: _boolean_cell}
