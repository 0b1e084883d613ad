"""Rows as NDJSON, CSV and Parquet: row <-> message, and the rejects that a load writes."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import BufferedIOBase
from typing import Any

import orjson
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.cli.environment import UsageError
from service.errors import InvalidField, MalformedMessage, RosterError, TooLarge
from service.fields import timestamp

MAX_LINE_BYTES = 8 << 20
# A row that the server could take has little more than 1 MiB of content.
MAX_ROW_BYTES = 2 << 20
SHOWN_BYTES = 1000  # of a line that is too long
MAX_IGNORED_NAMES = 100
PARQUET_ROWS = 256

BOM = b"\xef\xbb\xbf"
INTEGER = re.compile(r"-?[0-9]{1,19}")
CELL = re.compile(r'(?:^|,)("[^"]*(?:""[^"]*)*"|[^,]*)')
SPECIAL = re.compile(r'[",\r\n]')
ERROR = "_error"
LINE = "_line"


class SourceError(Exception):
    """The file as a whole can't be read as rows."""


@dataclass(slots=True)
class Row:
    """A row of a file: its message, or why it has none.

    `number` is that of its first line, from 1, `size` is in bytes. `original` is what a reject shows of it:
    a line of JSON, the cells of CSV as they stand in the file, or the values of Parquet.
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
    """One JSON object a line; a field that is null or missing is not set."""

    suffix = "ndjson"

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file."""
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield self._row(number, len(line), line)

    def _row(self, number: int, size: int, original: Any) -> Row:
        row = Row(number, size, original)
        try:
            row.message = self._columns.message(_object(original), JSON_PARSERS)
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
            return json_line({**_object(row.original), ERROR: why})
        except (RosterError, orjson.JSONEncodeError):  # orjson reads deeper nesting than it writes
            line = row.original if len(row.original) <= MAX_LINE_BYTES else row.original[:SHOWN_BYTES]
            return json_line({LINE: line.rstrip(b"\r\n").decode(errors="backslashreplace"), ERROR: why})


class Parquet(Ndjson):
    """Parquet, with pyarrow; a field that is null or missing is not set. Its rejects are NDJSON."""

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns)
        self._pyarrow = pyarrow()

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file; raises SourceError."""
        number = 0
        try:
            for batch in self._pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield self._row(number, batch.nbytes // len(batch), fields)
        except (self._pyarrow.ArrowException, OSError) as error:
            raise SourceError(f"the file can't be read as Parquet: {error}") from None


class Csv:
    """RFC 4180 with a header line, UTF-8; an empty cell is a field that is not set, `""` an empty text.

    So it is in PostgreSQL's COPY. In rejects `_error` is the first column, so that a row with too few or too
    many cells stays as it was.
    """

    suffix = "csv"

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._header: list[str] = []
        self._error_index: int | None = None

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file; raises SourceError for the header."""
        # A process has one limit; the default of 128 KiB is less than a post may have.
        csv.field_size_limit(MAX_LINE_BYTES)
        record = _Record(_lines(file))
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
                yield Row(record.number, record.size, [_quoted(record.text())], failure=_failure(told))
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
        if record.is_cut:
            shown = [_quoted(record.text()[:SHOWN_BYTES])]
            return Row(record.number, record.size, shown, failure=_failure(_too_long()))
        # A reader of Python 3.11 does not tell whether an empty cell had quotes.
        original = CELL.findall(record.text())
        if self._error_index is not None:
            for row in (cells, original):
                del row[self._error_index : self._error_index + 1]
        row = Row(record.number, record.size, original)
        try:
            row.message = self._columns.message(self._fields(record, cells, original), CSV_PARSERS)
        except RosterError as error:
            row.failure = _failure(error)
        return row

    def _fields(self, record: "_Record", cells: list[str], original: list[str]) -> dict[str, str | None]:
        if not record.is_utf8:
            raise MalformedMessage("the row is not UTF-8")
        if len(cells) != len(self._header):
            raise MalformedMessage(
                f"the number of cells is {len(cells)}, in the header line {len(self._header)}"
            )
        named = zip(self._header, cells, original, strict=True)
        return {name: cell if as_it_stands else None for name, cell, as_it_stands in named}

    def head(self) -> bytes:
        """Return what a file of rejects begins with."""
        return csv_line([ERROR, *self._header])

    def rejected(self, row: Row, failure: RowFailure) -> bytes:
        """Return a row with why it failed."""
        why = f"{failure.reason} {failure.field}".rstrip()
        line = ",".join([_cell(f"{why}: {failure.message}"), *row.original])
        return f"{line}\n".encode(errors="surrogateescape")


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


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON; raises JSONEncodeError."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME
    return orjson.dumps(fields, default=_text_of, option=option)


def csv_line(values: Iterable[Any]) -> bytes:
    """Return a row as a line of CSV: nothing for None, `""` for an empty text."""
    return f"{','.join(map(_cell, values))}\n".encode()


def pyarrow() -> Any:
    """Return the library that reads and writes Parquet."""
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'roster[parquet]'") from None
    return pyarrow


def _lines(file: BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a file, each cut behind MAX_LINE_BYTES."""
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(BOM)
    while line:
        yield line
        while line and not line.endswith(b"\n"):  # the rest of one that is too long
            line = file.readline(MAX_LINE_BYTES)
        line = file.readline(MAX_LINE_BYTES + 1)


def _object(original: Any) -> dict[str, Any]:
    if isinstance(original, dict):
        return original
    if len(original) > MAX_LINE_BYTES:
        raise _too_long()
    try:
        value = orjson.loads(original)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"the line is not JSON: {error.msg}, at column {error.colno:,}") from None
    if not isinstance(value, dict):
        raise MalformedMessage("the line is JSON, but not an object")
    return value


def _failure(error: RosterError) -> RowFailure:
    return RowFailure(reason=error.reason, field=error.field, message=error.message)


def _too_long() -> TooLarge:
    return TooLarge(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _text_of(value)
    return _quoted(text) if not text or SPECIAL.search(text) else text


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _text_of(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
    return str(value).lower() if isinstance(value, bool) else str(value)


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


def _moment(name: str, value: Any) -> Any:
    try:
        return timestamp(value if isinstance(value, datetime) else datetime.fromisoformat(value))
    except (TypeError, ValueError):
        raise InvalidField(f"{name} must be a time as in RFC 3339, with its zone", field=name) from None


def _set(parser: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    return lambda name, value: parser(name, value) if value else None


JSON_PARSERS: Parsers = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_INT64: _integer,
    FieldDescriptor.TYPE_BOOL: _boolean,
    FieldDescriptor.TYPE_MESSAGE: _moment,
}
CSV_PARSERS: Parsers = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_INT64: _set(_integer),
    FieldDescriptor.TYPE_BOOL: _set(_boolean_cell),
    FieldDescriptor.TYPE_MESSAGE: _set(_moment),
}
