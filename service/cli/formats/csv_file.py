"""CSV, read with Python's csv module."""

import codecs
import csv
import re
import shlex
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader, TextIOWrapper
from typing import TypeAlias

from google.protobuf.message import Message

from roster.errors import InvalidField, MalformedMessage, TooLarge
from roster.v1.bulk_pb2 import RowFailure
from service.cli.columns import ERROR, Columns
from service.cli.formats.base import MAX_LINE_BYTES, SourceError, check_size, shorten
from service.cli.formats.write import Quoted, csv_line, quote
from service.cli.rows import Row
from service.cli.terminal import pluralize
from service.cli.values import NULL_WORDS
from service.escape import escape

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
EXCEL_DELIMITER = re.compile(r"sep=(.)\s*")  # a first line that only Excel knows
POWERSHELL_TYPE = re.compile(r"#TYPE \S+\s*")  # a first line that only PowerShell knows
# The line below the header, or above it, in aligned table output.
RULER = re.compile(r"(?=.*[-=\u2500\u2501\u2550]{3})[-=+|:,;\s\u2500-\u257f]+")
MAX_TITLE_LINES = 20
E_MAIL = re.compile(r"\S@\S")
# As PostgreSQL's and MySQL's text formats escape characters.
ESCAPE = re.compile(r"\\[bfnrtv0\\]")
ESCAPED_LINE_END = re.compile(r"\\[\r\n]")  # in `content`, it can be a line of code
# A cell of a valid record, with what its quotes contain.
CELL = r' *"([^"]*(?:""[^"]*)*)"(?=DELIMITER|[\r\n]|\Z)|[^DELIMITER\r\n]*'
MARK_OF_FILE = "\ufeff"
BLANK = f"{MARK_OF_FILE} \t\r\n"
NAME = re.compile(r"[^\W\d][^@]*")  # and not a key
# Lines that a misplaced quote swallows are read again. Without a limit, a file of them takes quadratic time.
MAX_REREAD = 64 << 20
NO_ENCODING = "save the file as UTF-8, or add --encoding, such as cp1252 for Windows or mac_roman for a Mac"

# The text of a row, and its cells or the reason why it has none.
Record: TypeAlias = tuple[str, list[str] | csv.Error]


class RecordTooLong(csv.Error):
    """A record goes on for more than MAX_LINE_BYTES."""


class Lines(Iterator[str]):
    """The lines of a file, with any line end; keeps those of the current record.

    A longer line than MAX_LINE_BYTES is truncated to just over it.
    """

    def __init__(self, file: TextIOWrapper) -> None:
        self.number = 0  # of the first line of the record
        self.record: list[str] = []
        self._readline = partial(file.readline, MAX_LINE_BYTES + 1)
        self._returned: deque[str] = deque()
        self._size = 0  # of the record
        self._budget = MAX_REREAD  # what may still be read again

    def __next__(self) -> str:
        if self._size > MAX_LINE_BYTES:
            raise RecordTooLong
        line = self._returned.popleft() if self._returned else self._read()
        if not line:
            raise StopIteration
        self._size += len(line)
        if not self.record:  # in files that were put together there are marks inside
            line = line.removeprefix(MARK_OF_FILE)
        self.record.append(line)
        return line

    @property
    def text(self) -> str:
        """The text of the record."""
        return self.record[0] if len(self.record) == 1 else "".join(self.record)

    def start_record(self) -> None:
        """Forget the lines of the last record."""
        self.number += len(self.record)
        self.record = []
        self._size = 0

    def rewind(self) -> None:
        """Read the record again."""
        self._return_after(0)

    def keep_first_line(self) -> None:
        """Keep only the first line of the record, and read the others again; raises SourceError."""
        self._budget -= sum(map(len, self.record[1:]))
        if self._budget < 0:
            raise SourceError(f"too many quotes are misplaced, the last one at line {self.number + 1}")
        self._return_after(1)

    def _return_after(self, kept: int) -> None:
        self._returned.extendleft(reversed(self.record[kept:]))
        del self.record[kept:]
        self._size = sum(map(len, self.record))

    def _read(self) -> str:
        try:
            line = self._readline()
            if len(line) > MAX_LINE_BYTES:
                rest = line
                while rest and not rest.endswith(("\n", "\r")):
                    rest = self._readline()
        except UnicodeDecodeError as error:
            raise SourceError(f"the file is not {error.encoding}: {error.reason}") from None
        return line


class Csv:
    """CSV (RFC 4180) with a header line, and with the deviations that are common in practice.

    Any line end; the delimiter is found from the header; spaces after delimiters; blank rows; columns
    without a name are ignored. As in PostgreSQL's COPY, an empty cell is unset and a quoted empty cell is an
    empty string. A quote inside a cell that does not begin with one is a character like any other. Text after
    a closing quote, and a quote that is never closed, fail the row. `null` has the texts of unquoted cells
    that are unset. A word such as NULL that is not one of them fails the row, as do escapes with a backslash.

    In rejects, `_error` is the first column, so that a row with too few or too many cells keeps its cells in
    their columns.
    """

    name, suffix, unit = "Csv", "csv", "line"

    def __init__(
        self, columns: Columns, delimiter: str = "", encoding: str = "utf-8", null: Collection[str] = ()
    ) -> None:
        self.columns = columns
        self._null = null
        self._null_words = NULL_WORDS.union(null)
        self._delimiter = delimiter
        self._encoding = encoding
        self._has_spaces = False  # after each delimiter, as the header has them
        self._header: list[str] = []
        self._fields: list[str | None] = []
        self._key: int | None = None  # the index of a column that shows further header lines
        self._names: frozenset[str] = frozenset()
        self._cell = re.compile("")
        csv.field_size_limit(MAX_LINE_BYTES)

    def rows(self, file: BufferedReader) -> Iterator[Row[Record]]:
        text = TextIOWrapper(file, self._detect_encoding(file), errors="surrogateescape", newline="")
        lines = Lines(text)
        try:
            self._read_header(lines)
            yield from self._read_rows(lines)
        finally:
            with suppress(ValueError):  # the file is closed
                text.detach()

    def _detect_encoding(self, file: BufferedReader) -> str:
        start = file.peek(len(codecs.BOM_UTF8))
        if start.startswith(UTF_16):  # a mark says more than --encoding
            return "utf-16"
        return "utf-8-sig" if start.startswith(codecs.BOM_UTF8) else self._encoding

    @property
    def _not_encoded(self) -> str:
        return f"not {self._encoding.upper()}; {NO_ENCODING}"

    def _read_header(self, lines: Lines) -> None:
        for first in lines:
            if found := EXCEL_DELIMITER.fullmatch(first):
                self._delimiter = self._delimiter or found[1]
            elif first.strip(BLANK) and not POWERSHELL_TYPE.fullmatch(first):
                break
            lines.start_record()
        else:
            raise SourceError("the file is empty; CSV needs a header line")
        if "\0" in first:
            raise SourceError("the file contains zero bytes; if it is UTF-16, add --encoding utf-16-le")
        if not _is_encodable(first):
            raise SourceError(f"the header line is {self._not_encoded}")
        if RULER.fullmatch(first) or RULER.fullmatch(next(lines, "")):
            raise SourceError(
                "the file is aligned table output, not CSV; export it as CSV, such as with psql --csv or "
                "sqlite3 -header -csv"
            )
        lines.rewind()
        candidates = [self._delimiter] if self._delimiter else DELIMITERS.values()
        headers = {delimiter: _read_names(lines, delimiter) for delimiter in candidates}
        known = {delimiter: self.columns.count_known(names) for delimiter, names in headers.items()}
        self._delimiter = max(known, key=known.__getitem__)
        self._header = headers[self._delimiter]
        self._check_header(lines, known[self._delimiter])
        others = next(csv.reader(lines, delimiter=self._delimiter))[1:]
        self._has_spaces = bool(others) and all(name.startswith(" ") for name in others)
        delimiter = re.escape(self._delimiter)
        self._cell = re.compile(CELL.replace("DELIMITER", delimiter))

    def _check_header(self, lines: Lines, known: int) -> None:
        advice = "" if known else self._suggest_header(lines)
        self._fields = self.columns.check(self._header, "the header line", advice)
        keys = [index for index, field in enumerate(self._fields) if field in self.columns.entity.keys]
        self._key = keys[0] if keys else None
        self._names = frozenset(map(str.casefold, filter(NAME.fullmatch, self._header)))

    def _suggest_header(self, lines: Lines) -> str:
        """Return what to do about a header without known columns: it may be missing, or be below a title."""
        lines.start_record()
        if next(lines).lstrip(BLANK).startswith(("{", "[")):
            raise SourceError("the file looks like JSON; add --format ndjson")
        if any(map(E_MAIL.search, self._header)):
            first, second, *_ = self.columns.names
            return (
                f"if this is a row, add a header line such as {first},{second}; if not, name the columns "
                f"with --columns, such as --columns {first}=NAME"
            )
        for number in range(MAX_TITLE_LINES):
            line = next(lines, "")
            with suppress(csv.Error, StopIteration):
                for delimiter in DELIMITERS.values():
                    names = next(csv.reader([line], delimiter=delimiter))
                    if self.columns.count_known(name.strip(BLANK) for name in names):
                        return f"if line {lines.number + number + 2} is the header, delete the lines above it"
        return ""

    def _read_rows(self, lines: Lines) -> Iterator[Row[Record]]:
        reader = self._reader(lines, has_spaces=self._has_spaces)
        blank = BLANK + self._delimiter
        while True:
            lines.start_record()
            error: csv.Error | None = None
            cells: list[str] = []
            try:
                cells = next(reader)
                if ' "' in lines.text and any(map(_may_be_quoted, cells)):
                    cells = self._read_spaced(lines, cells)
            except StopIteration:
                return
            except csv.Error as raised:
                # The lines after the first may be rows that a stray quote has swallowed.
                lines.keep_first_line()
                error = raised
                reader = self._reader(lines, has_spaces=self._has_spaces)
            record, parse = lines.text, self._to_message
            if self._is_header(cells):
                if not self._repeats_header(cells):
                    raise SourceError(
                        f"line {lines.number + 1} is a header line with other columns; "
                        "load the files that were put together one by one"
                    )
                parse = self._refuse_header
            if error or record.strip(blank):
                yield Row(lines.number + 1, len(record), (record, error or cells), parse)

    def _is_header(self, cells: list[str]) -> bool:
        """Return whether a row is a further header line, as in files that were put together."""
        key = self._key
        return key is not None and key < len(cells) and cells[key].strip(BLANK).casefold() in self._names

    def _repeats_header(self, cells: list[str]) -> bool:
        names = [cell.strip(BLANK).casefold() for cell in cells]
        return names == [name.casefold() for name in self._header]

    def _read_spaced(self, lines: Lines, cells: list[str]) -> list[str]:
        """Return the cells of a record again, without spaces before a quoted cell; raises csv.Error."""
        lines.rewind()
        spaced = next(self._reader(lines, has_spaces=True))
        pairs = zip(cells, spaced, strict=False)
        is_spaced = any(cell != other for cell, other in pairs if _may_be_quoted(cell))
        return spaced if is_spaced else cells

    def _reader(self, lines: Iterable[str], *, has_spaces: bool) -> Iterator[list[str]]:
        # Without strict, it reads `"Al" Smith` as `Al Smith`.
        return csv.reader(lines, delimiter=self._delimiter, skipinitialspace=has_spaces, strict=True)

    def _to_message(self, original: Record) -> Message:
        record, cells = original
        check_size(record)
        if isinstance(cells, csv.Error):
            raise _explain(cells, record)
        if not _is_encodable(record):
            raise MalformedMessage(f"the row is {self._not_encoded}")
        count = len(self._header)
        if len(cells) != count and (len(cells) < count or any(cells[count:])):
            raise MalformedMessage(f"the row has {pluralize(len(cells), 'cell')}, but the header has {count}")
        values: list[str | None] = [cell or None for cell in cells]
        if '""' in record and None in values:
            for index in self._quoted_cells(record, cells):
                values[index] = ""
        if not self._null_words.isdisjoint(cells):
            for index in self._null_cells(record, cells):
                values[index] = None
        if "\\" in record:
            self._refuse_escapes(record, cells)
        return self.columns.message_of(self._fields, values)

    @staticmethod
    def _refuse_header(original: Record) -> Message:  # noqa: ARG004
        raise MalformedMessage("the row repeats the header line, and can be left out")

    def _null_cells(self, record: str, cells: list[str]) -> list[int]:
        """Return the indexes of the cells that mean null; raises InvalidField if that is not certain."""
        indexes = []
        for index, (field, cell) in enumerate(zip(self._fields, cells, strict=False)):
            if not field or cell not in self._null_words or index in self._quoted_cells(record, cells, cell):
                continue
            if cell not in self._null:
                option = f"--null {shlex.quote(cell)}"
                raise InvalidField(
                    f"{field} contains {cell}. If it means no value, add {option}; if it is text, "
                    "put it in quotes",
                    field=field,
                )
            indexes.append(index)
        return indexes

    def _refuse_escapes(self, record: str, cells: list[str]) -> None:
        """Raise InvalidField for a cell in which a backslash seems to escape a character."""
        for field, cell in zip(self._fields, cells, strict=False):
            if not field or "\\" not in cell or cell in self._null:
                continue
            is_escaped = '\\"' in cell or (self._delimiter == "\t" and ESCAPE.search(cell))
            advice = "export CSV with quotes and without escapes"
            if is_escaped and quote(cell) not in record:
                advice += ", or write it in quotes if it is text"
            elif field == "content" or not ESCAPED_LINE_END.search(cell):
                continue
            raise InvalidField(
                f"{field} seems to contain a character that is escaped with a backslash; {advice}",
                field=field,
            )

    def _quoted_cells(self, record: str, cells: list[str], text: str = "") -> list[int]:
        """Return the indexes of the cells that are a text in quotes, which the csv module does not reveal."""
        position, indexes = 0, []
        for index, cell in enumerate(cells):
            found = self._cell.match(record, position)
            if found is None:
                raise AssertionError("the record was read before")
            if cell == text and found[1] is not None:
                indexes.append(index)
            position = found.end() + 1
        return indexes

    def rejects_header(self) -> bytes:
        # With the mark, the same --encoding can be given for the rejects.
        mark = b"" if self._encoding == "utf-8" else codecs.BOM_UTF8
        return mark + csv_line([ERROR, *(name for name in self._header if name != ERROR)])

    def reject(self, row: Row[Record], failure: RowFailure) -> bytes:
        error = f"{self.unit} {row.number}: {failure.reason} {failure.field}".rstrip()
        return csv_line([escape(f"{error}: {failure.message}"), *self._rejected_cells(row)])

    def _rejected_cells(self, row: Row[Record]) -> list[str | None]:
        record, cells = row.original
        if isinstance(cells, csv.Error):
            return [shorten(row, record.rstrip("\r\n"))]
        try:
            self._refuse_escapes(record, cells)
        except InvalidField:  # as one cell, it fails again until somebody has decided
            return [record.rstrip("\r\n")]
        quoted = self._quoted_cells(record, cells)
        values = [cell if cell or index in quoted else None for index, cell in enumerate(cells)]
        for word in self._null_words.intersection(cells):
            for index in self._quoted_cells(record, cells, word):
                values[index] = Quoted(word)
        earlier_error = self._header.index(ERROR) if ERROR in self._header else len(values)
        return values[:earlier_error] + values[earlier_error + 1 :]


def _read_names(lines: Lines, delimiter: str) -> list[str]:
    """Return the names in the header, [] if it is not CSV with this delimiter. The lines are read again."""
    names: list[str] = []
    with suppress(csv.Error):
        names = next(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
    lines.rewind()
    return [name.strip(BLANK) for name in names]


def _may_be_quoted(cell: str) -> bool:
    return cell.startswith(" ") and cell.lstrip(" ").startswith('"')


def _is_encodable(text: str) -> bool:
    """Return whether a text was valid in the encoding of its file."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _explain(error: csv.Error, record: str) -> MalformedMessage | TooLarge:
    message = str(error)
    if "unexpected end" in message:
        return MalformedMessage("a quote is never closed")
    if isinstance(error, RecordTooLong) or "field limit" in message:
        return TooLarge(f"a quote is not closed within {MAX_LINE_BYTES >> 20} MiB")
    if "expected after" in message:
        wrong = ', not as \\"' if '\\"' in record else ""
        return MalformedMessage(
            f"text follows a closing quote; a quote inside a quoted cell is written twice{wrong}"
        )
    return MalformedMessage(f"the row is not CSV: {message}")
