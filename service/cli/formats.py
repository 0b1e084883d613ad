"""NDJSON, CSV and Parquet: files of rows, read and written, and the rejects of a load."""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from io import BufferedIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
import orjson
from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.cli.rows import ERROR, Columns, Row
from service.cli.terminal import UsageError, counted
from service.errors import MalformedMessage, RosterError, TooLarge
from service.escape import escape

STDIN = "-"
MAX_LINE_BYTES = 8 << 20
SHOWN_BYTES = 1000  # of a row that is too long
PARQUET_ROWS = 256  # read at once: a row has 1 MiB at worst

BOM = b"\xef\xbb\xbf"
CELL = re.compile(r'(?:^|,)("[^"]*(?:""[^"]*)*"|[^",]*)')
SPECIAL = re.compile(r'[",\r\n]')
LINE = "_line"


class SourceError(Exception):
    """The file as a whole can't be read as rows."""


class Ndjson:
    """One JSON object a line; a field that is null or missing is not set."""

    suffix, unit = "ndjson", "line"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file."""
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield Row.of(number, len(line), line, self._message)

    def _message(self, original: Any) -> Message:
        return self.columns.message(_object(original))

    def head(self) -> bytes:
        """Return what a file of rejects begins with."""
        return b""

    def rejected(self, row: Row, failure: RowFailure) -> bytes:
        """Return a row with why it failed."""
        why = {name: getattr(failure, name) for name in ("reason", "field", "message")}
        why["row"] = row.number
        try:
            line = json_line({**_object(row.original), ERROR: why})
        except (RosterError, orjson.JSONEncodeError):  # orjson reads deeper nesting than it writes
            text = row.original.rstrip(b"\r\n").decode(errors="backslashreplace")
            line = json_line({LINE: _shown(row, text), ERROR: why})
        return escape(line.decode().removesuffix("\n")).encode() + b"\n"


class Parquet(Ndjson):
    """Parquet, by pyarrow; a field that is null or missing is not set. Its rejects are NDJSON."""

    unit = "row"

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns)
        self._pyarrow = pyarrow()

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file; raises SourceError."""
        number = 0
        try:
            for batch in self._pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row.of(number, batch.nbytes // len(batch), values, self._message)
        except self._pyarrow.ArrowException as error:
            raise SourceError(f"this is no Parquet that can be read: {error}") from None


class Csv:
    """RFC 4180 with a header line, UTF-8; an empty cell is a field that is not set, `""` an empty text.

    It is so in PostgreSQL's COPY too; the csv module can't tell them apart before Python 3.13. In rejects
    `_error` is the first column, so that a row with too few or too many cells stays as it was.
    """

    suffix, unit = "csv", "line"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._header: list[str] = []

    def rows(self, file: BufferedIOBase) -> Iterator[Row]:
        """Yield the rows of a file; raises SourceError for the header."""
        records = _records(file)
        if (first := next(records, None)) is None:
            raise SourceError("the file is empty; CSV begins with a header line")
        self._header = self._names(first[1])
        for number, record in records:
            if record.strip(b"\r\n"):
                yield Row.of(number, len(record), record, self._message)

    def _names(self, record: bytes) -> list[str]:
        try:
            names = [str(_value(cell)).strip() for cell in _cells(record.decode())]
        except (UnicodeDecodeError, RosterError):
            raise SourceError("the header line is no CSV in UTF-8") from None
        if len(set(names)) < len(names):
            raise SourceError("the header line has a name twice")
        if not set(names) & set(self.columns.names):
            hint = "; commas separate the columns" if b";" in record or b"\t" in record else ""
            raise SourceError(f"the header line names none of {', '.join(self.columns.names)}{hint}")
        return names

    def _message(self, record: bytes) -> Message:
        _check_size(record)
        try:
            cells = _cells(record.decode())
        except UnicodeDecodeError:
            raise MalformedMessage("the row is not UTF-8") from None
        if len(cells) != len(self._header):
            raise MalformedMessage(f"{counted(len(cells), 'cell')}, but the header has {len(self._header)}")
        values = zip(self._header, map(_value, cells), strict=True)
        return self.columns.message(dict(values))

    def head(self) -> bytes:
        """Return what a file of rejects begins with."""
        return csv_line([ERROR, *(name for name in self._header if name != ERROR)])

    def rejected(self, row: Row, failure: RowFailure) -> bytes:
        """Return a row with why it failed."""
        text = row.original.decode(errors="surrogateescape").rstrip("\r\n")
        try:
            named = zip_longest(_cells(text), self._header)
            cells = [cell for cell, name in named if name != ERROR and cell is not None]
        except MalformedMessage:
            cells = [_quoted(_shown(row, text))]
        why = f"{self.unit} {row.number}: {failure.reason} {failure.field}".rstrip()
        line = ",".join([_cell(escape(f"{why}: {failure.message}")), *cells])
        return f"{line}\n".encode(errors="surrogateescape")


FileFormat = Ndjson | Csv
FORMATS: dict[str, type[FileFormat]] = {"ndjson": Ndjson, "csv": Csv, "parquet": Parquet}
ENDINGS = {".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson", ".csv": "csv", ".parquet": "parquet"}


def format_name(file: str) -> str:
    """Return what is in a file by its name; a person is asked where that does not tell."""
    ending = Path(file.lower().removesuffix(".gz")).suffix
    if file != STDIN and ending not in ENDINGS:
        raise click.UsageError(f"the name {file} does not say what is in it; add --format")
    return ENDINGS.get(ending, "ndjson")


def json_line(values: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON; raises JSONEncodeError."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME
    return orjson.dumps(values, default=_text, option=option)


def csv_line(values: Iterable[Any]) -> bytes:
    """Return a row as a line of CSV: nothing for None, `""` for an empty text."""
    return f"{','.join(map(_cell, values))}\n".encode()


def pyarrow() -> Any:
    """Return the library that reads and writes Parquet; ends the command where it is missing."""
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow


def _lines(file: BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a file, each cut behind MAX_LINE_BYTES."""
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(BOM)
    while line:
        yield line
        while line and not line.endswith(b"\n"):  # the rest of one that is too long
            line = file.readline(MAX_LINE_BYTES)
        line = file.readline(MAX_LINE_BYTES + 1)


def _records(file: BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Yield the records of CSV, each with the number of its first line; in quotes it goes on."""
    lines: list[bytes] = []
    number, size, is_open = 0, 0, False
    for number, line in enumerate(_lines(file), start=1):
        lines.append(line)
        size += len(line)
        is_open ^= line.count(b'"') % 2 == 1
        # A quote that is never closed would swallow all the rows behind it.
        if not is_open or size > MAX_LINE_BYTES:
            yield number - len(lines) + 1, b"".join(lines)
            lines, size, is_open = [], 0, False
    if lines:
        yield number - len(lines) + 1, b"".join(lines)


def _cells(record: str) -> list[str]:
    """Return the cells of a record as they stand there, in quotes or not; raises MalformedMessage."""
    text = record.rstrip("\r\n")
    cells = CELL.findall(text)
    if sum(map(len, cells)) + len(cells) - 1 != len(text):
        raise MalformedMessage("the row is not CSV: a quote is missing, or in the wrong place")
    return cells


def _value(cell: str) -> str | None:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell or None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _text(value)
    return _quoted(text) if not text or SPECIAL.search(text) else text


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _object(original: Any) -> dict[str, Any]:
    if isinstance(original, dict):
        return original
    _check_size(original)
    try:
        value = orjson.loads(original)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"the line is not JSON: {error.msg}, at column {error.colno:,}") from None
    if not isinstance(value, dict):
        raise MalformedMessage("the line is JSON, but not an object")
    return value


def _check_size(original: bytes) -> None:
    if len(original) > MAX_LINE_BYTES:
        raise TooLarge(f"the row is longer than {MAX_LINE_BYTES >> 20} MiB")


def _shown(row: Row, text: str) -> str:
    return text if row.size <= MAX_LINE_BYTES else text[:SHOWN_BYTES]
