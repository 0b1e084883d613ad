"""File formats: NDJSON, CSV and Parquet. Reads rows, and writes rows and rejects."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from io import BufferedIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import click
import orjson
from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.cli.rows import ERROR, Columns, Row, Values
from service.cli.terminal import UsageError, pluralize
from service.errors import MalformedMessage, RosterError, TooLarge
from service.escape import escape

STDIN = "-"
MAX_LINE_BYTES = 8 << 20
KEPT_CHARACTERS = 1000  # of a row that is too long, in the rejects
PARQUET_ROWS = 256  # read at once; a row has up to 1 MiB

BOM = b"\xef\xbb\xbf"
CELL = re.compile(r'(?:^|,)("[^"]*(?:""[^"]*)*"|[^",]*)')
SPECIAL = re.compile(r'[",\r\n]')
LINE = "_line"


class SourceError(Exception):
    """The file as a whole can't be read."""


class FileFormat(Protocol):
    """Reads rows from a file, and formats the rows that fail as rejects.

    `unit` is what `Row.number` counts; `suffix` is the suffix of a file of rejects.
    """

    suffix: str
    unit: str

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file; raises SourceError."""
        ...

    def rejects_header(self) -> bytes:
        """Return the beginning of a file of rejects."""
        ...

    def reject(self, row: Row, failure: RowFailure) -> bytes:
        """Return a row with the reason why it failed, as `_error`."""
        ...


class Ndjson:
    """NDJSON: one JSON object per line. Null and missing fields are unset."""

    suffix, unit = "ndjson", "line"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield Row.parse(number, len(line), line, self._to_message)

    def _to_message(self, line: bytes) -> Message:
        return self.columns.to_message(_json_object(line))

    def rejects_header(self) -> bytes:
        return b""

    def reject(self, row: Row, failure: RowFailure) -> bytes:
        try:
            return _json_reject(_json_object(row.original), row, failure)
        except (RosterError, orjson.JSONEncodeError):  # orjson reads deeper nesting than it writes
            text = row.original.rstrip(b"\r\n").decode(errors="backslashreplace")
            return _json_reject({LINE: _shorten(row, text)}, row, failure)


class Parquet:
    """Parquet, read with pyarrow. Null and missing fields are unset. Its rejects are NDJSON."""

    suffix, unit = "ndjson", "row"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._pyarrow = pyarrow()

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row.parse(number, batch.nbytes // len(batch), values, self.columns.to_message)
        except self._pyarrow.ArrowException as error:
            raise SourceError(f"the file can't be read as Parquet: {error}") from None

    def rejects_header(self) -> bytes:
        return b""

    def reject(self, row: Row, failure: RowFailure) -> bytes:
        return _json_reject(row.original, row, failure)


class Csv:
    """CSV (RFC 4180) in UTF-8, with a header line.

    As in PostgreSQL's COPY, an empty cell is unset and a quoted empty cell is an empty string. The csv module
    can't distinguish these before Python 3.13. In rejects, `_error` is the first column, so that a row
    with too few or too many cells keeps its cells in their columns.
    """

    suffix, unit = "csv", "line"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._header: list[str] = []

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        records = _records(file)
        first = next(records, None)
        if first is None:
            raise SourceError("the file is empty; CSV needs a header line")
        _, header = first
        self._header = self._parse_header(header)
        for number, record in records:
            if record.strip(b"\r\n"):
                yield Row.parse(number, len(record), record, self._to_message)

    def _parse_header(self, record: bytes) -> list[str]:
        try:
            names = [str(_value(cell)).strip() for cell in _cells(record.decode())]
        except (UnicodeDecodeError, RosterError):
            raise SourceError("the header line is not CSV in UTF-8") from None
        if len(set(names)) < len(names):
            raise SourceError("the header line contains a column name twice")
        if not set(names) & set(self.columns.names):
            has_other_separators = b";" in record or b"\t" in record
            hint = "; columns must be separated by commas" if has_other_separators else ""
            raise SourceError(f"the header line contains none of {', '.join(self.columns.names)}{hint}")
        return names

    def _to_message(self, record: bytes) -> Message:
        _check_size(record)
        try:
            cells = _cells(record.decode())
        except UnicodeDecodeError:
            raise MalformedMessage("the row is not UTF-8") from None
        if len(cells) != len(self._header):
            raise MalformedMessage(
                f"the row has {pluralize(len(cells), 'cell')}, but the header has {len(self._header)}"
            )
        values = zip(self._header, map(_value, cells), strict=True)
        return self.columns.to_message(dict(values))

    def rejects_header(self) -> bytes:
        return csv_line([ERROR, *(name for name in self._header if name != ERROR)])

    def reject(self, row: Row, failure: RowFailure) -> bytes:
        text = row.original.decode(errors="surrogateescape").rstrip("\r\n")
        try:
            named = zip_longest(_cells(text), self._header)
            cells = [cell for cell, name in named if name != ERROR and cell is not None]
        except MalformedMessage:
            cells = [_quote(_shorten(row, text))]
        error = f"{self.unit} {row.number}: {failure.reason} {failure.field}".rstrip()
        line = ",".join([_cell(escape(f"{error}: {failure.message}")), *cells])
        return f"{line}\n".encode(errors="surrogateescape")


FORMATS: Mapping[str, Callable[[Columns], FileFormat]] = {
    "ndjson": Ndjson,
    "csv": Csv,
    "parquet": Parquet,
}
ENDINGS = {".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson", ".csv": "csv", ".parquet": "parquet"}


def format_name(file: str) -> str:
    """Return the format that the name of a file implies; raises UsageError if there is none."""
    ending = Path(file.lower().removesuffix(".gz")).suffix
    if file != STDIN and ending not in ENDINGS:
        raise click.UsageError(f"the name of {file} does not imply a format; add --format")
    return ENDINGS.get(ending, "ndjson")


def json_line(values: Values) -> bytes:
    """Return values as a line of JSON; raises JSONEncodeError."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME
    return orjson.dumps(values, default=_text, option=option)


def csv_line(values: Iterable[Any]) -> bytes:
    """Return values as a line of CSV: None is an empty cell, an empty string is `""`."""
    return f"{','.join(map(_cell, values))}\n".encode()


def pyarrow() -> Any:
    """Return the pyarrow module; raises UsageError if it is not installed."""
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UsageError("Parquet requires pyarrow: pip install pyarrow") from None
    return pyarrow


def _lines(file: BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a file, each truncated to just over MAX_LINE_BYTES."""
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(BOM)
    while line:
        yield line
        while line and not line.endswith(b"\n"):  # skip the rest of a line that is too long
            line = file.readline(MAX_LINE_BYTES)
        line = file.readline(MAX_LINE_BYTES + 1)


def _records(file: BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Yield the records of a CSV file, with the number of their first line. Quotes can contain line ends."""
    lines: list[bytes] = []
    number, size, is_open = 0, 0, False
    for number, line in enumerate(_lines(file), start=1):
        lines.append(line)
        size += len(line)
        is_open ^= line.count(b'"') % 2 == 1
        # The size limit keeps an unclosed quote from swallowing the rest of the file.
        if not is_open or size > MAX_LINE_BYTES:
            yield number - len(lines) + 1, b"".join(lines)
            lines, size, is_open = [], 0, False
    if lines:
        yield number - len(lines) + 1, b"".join(lines)


def _cells(record: str) -> list[str]:
    """Return the cells of a record, still quoted; raises MalformedMessage."""
    text = record.rstrip("\r\n")
    cells = CELL.findall(text)
    if sum(map(len, cells)) + len(cells) - 1 != len(text):
        raise MalformedMessage("the row is not CSV: a quote is missing or misplaced")
    return cells


def _value(cell: str) -> str | None:
    """Return the value of a cell; None if it is empty."""
    if cell.startswith('"'):
        return cell[1:-1].replace('""', '"')
    return cell or None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _text(value)
    needs_quotes = not text or SPECIAL.search(text)
    return _quote(text) if needs_quotes else text


def _quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    text = str(value)
    return text.lower() if isinstance(value, bool) else text


def _json_reject(values: Values, row: Row, failure: RowFailure) -> bytes:
    error = {
        "reason": failure.reason,
        "field": failure.field,
        "message": failure.message,
        "row": row.number,
    }
    line = json_line({**values, ERROR: error})
    return escape(line.decode().removesuffix("\n")).encode() + b"\n"


def _json_object(line: bytes) -> Values:
    _check_size(line)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"the line is not JSON: {error.msg}, at column {error.colno:,}") from None
    if not isinstance(value, dict):
        raise MalformedMessage("the line is JSON, but not an object")
    return value


def _check_size(original: bytes) -> None:
    if len(original) > MAX_LINE_BYTES:
        raise TooLarge(f"the row is longer than {MAX_LINE_BYTES >> 20} MiB")


def _shorten(row: Row, text: str) -> str:
    return text if row.size <= MAX_LINE_BYTES else text[:KEPT_CHARACTERS]
