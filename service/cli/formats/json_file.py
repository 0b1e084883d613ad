"""JSON: lines, one array, or an object with one array."""

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from io import BufferedReader, RawIOBase, TextIOWrapper
from typing import Any

import orjson
from google.protobuf.message import Message

from roster.v1.bulk_pb2 import RowFailure
from service.cli.columns import Columns
from service.cli.formats.base import MAX_LINE_BYTES, SourceError, check_size, json_reject, unparsed_reject
from service.cli.rows import Row, Values
from service.errors import InvalidField, MalformedMessage, RosterError
from service.escape import escape

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READ_BYTES = 1 << 16
HEAD_LINES = 2
MAX_SHOWN_NAMES = 10
DECODER = json.JSONDecoder()
WHITESPACE = " \t\r\n"


class Json:
    """JSON in UTF-8, or in UTF-16 with a byte order mark. Null and missing fields are unset.

    If the first line is a row, each line is one, and a line that is not JSON fails alone (NDJSON). Otherwise
    the file is a document, and is read piece by piece: an array of rows, an object with one such array, or
    rows that span lines. Its rejects are NDJSON.
    """

    name, suffix = "Ndjson", "ndjson"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.unit = "line"

    def rows(self, file: BufferedReader) -> Iterator[Row[Any]]:
        opened = _open_utf8(file)
        head = _read_head(opened)
        whole = _open(opened.read1, b"".join(head))
        if self._has_a_row_per_line(head):
            yield from self._lines(whole)
            return
        self.unit = "row"
        array: str | None = self.columns.plural
        if file.seekable():
            with closing(JsonText(whole)) as text:
                array = self._find_array(text)
            file.seek(0)
            whole = _open_utf8(file)
        with closing(JsonText(whole)) as text:
            yield from self._document(text, array)

    def _has_a_row_per_line(self, head: list[bytes]) -> bool:
        """Return whether the first line is a row, or the second one: the first may be damaged."""
        lines = b"".join(head).removeprefix(codecs.BOM_UTF8).lstrip().splitlines()
        if not lines or not lines[0].startswith((b"{", b"[")):
            return True  # each line fails
        for line in lines:
            if line.startswith(b"["):
                return False
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict):
                has_array = any(isinstance(value, list) for value in row.values())
                is_row = not has_array or self.columns.knows(row) > 0
                if is_row:
                    self._check_columns(row)
                return is_row
        return False

    def _check_columns(self, row: Values) -> None:
        """Raise SourceError if a column of the first row may be misspelt, or if it has none that is known."""
        try:
            self.columns.fields_of(list(row))
        except InvalidField as error:
            raise SourceError(error.message) from None
        if row and not self.columns.knows(row):
            raise SourceError(
                f"the first row has none of the columns {', '.join(self.columns.names)}; it has "
                f"{escape(', '.join(list(row)[:MAX_SHOWN_NAMES]))}; name the columns with --columns, or "
                "write rows with these names, such as with jq"
            )

    def _lines(self, file: BufferedReader) -> Iterator[Row[Any]]:
        for number, line in enumerate(_read_lines(file), start=1):
            if line.strip():
                yield Row(number, len(line), line, self._parse_line)

    def _parse_line(self, line: bytes) -> Message:
        return self.columns.to_message(_parse_object(line))

    def _document(self, text: "JsonText", array: str | None) -> Iterator[Row[Any]]:
        for number, (value, size) in enumerate(self._values(text, array), start=1):
            if number == 1 and isinstance(value, dict):
                self._check_columns(value)
            yield Row(number, size, value, self._parse_value)

    def _find_array(self, text: "JsonText") -> str | None:
        """Return the name of the array of rows in the first object; None if the object is itself a row.

        Raises SourceError if it has several arrays.
        """
        if text.peek() != "{":
            return None
        arrays = []
        for name in text.members():
            if self.columns.knows([name]):
                return None
            if name == self.columns.plural:
                return name
            if text.peek() == "[":
                arrays.append(name)
            text.skip_value()
        if len(arrays) > 1:
            shown = escape(", ".join(arrays[:10]))
            raise SourceError(
                f"the object has several arrays ({shown}); take one out: jq '.{arrays[0]}' FILE"
            )
        return arrays[0] if arrays else None

    def _values(self, text: "JsonText", array: str | None) -> Iterator[tuple[Any, int]]:
        """Yield the rows of a document with their sizes."""
        while start := text.peek():
            if start == "[":
                yield from text.elements()
            elif start == "{" and array:
                yield from _rows_in_object(text, array)
            else:
                yield text.value()

    def _parse_value(self, value: Any) -> Message:
        if not isinstance(value, dict):
            raise MalformedMessage("the row is JSON, but not an object")
        return self.columns.to_message(value)

    def rejects_header(self) -> bytes:
        return b""

    def reject(self, row: Row[Any], failure: RowFailure) -> bytes:
        if not isinstance(row.original, bytes):
            return json_reject(row.original, row, failure)
        try:
            return json_reject(_parse_object(row.original), row, failure)
        except RosterError:
            text = row.original.rstrip(b"\r\n").decode(errors="backslashreplace")
            return unparsed_reject(text, row, failure)


class JsonText:
    """The text of a JSON document, which is read and decoded as far as needed. Raises SourceError.

    Bytes that are not UTF-8 become lone surrogates, which fail their row.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        self._text = ""
        self._position = 0
        self._is_complete = False
        self._row = 0  # the number of the last one

    def close(self) -> None:
        """Leave the file open: it belongs to the caller."""
        with suppress(ValueError):  # the file is closed
            self._file.detach()

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in WHITESPACE:
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if self._is_complete:
                return ""
            self._read()

    def value(self) -> tuple[Any, int]:
        """Return the next value, and its length."""
        self.peek()
        while True:
            length = len(self._text) - self._position
            try:
                value, end = DECODER.raw_decode(self._text, self._position)
                # The next character may belong to a number.
                if end < len(self._text) or self._is_complete:
                    size, self._position = end - self._position, end
                    return value, size
            except (ValueError, RecursionError) as error:
                if self._is_complete or length > MAX_LINE_BYTES:
                    raise self._error(getattr(error, "msg", "a value is too large")) from None
            self._read(length)

    def elements(self) -> Iterator[tuple[Any, int]]:
        """Yield the elements of the array that comes next, with their lengths."""
        self._take("[")
        while self.peek() != "]":
            self._row += 1
            yield self.value()
            self._take_comma_before("]")
        self._take("]")

    def members(self) -> Iterator[str]:
        """Yield the names of the object that comes next. Before the next name, the value must be read."""
        self._take("{")
        while self.peek() != "}":
            name, _ = self.value()
            self._take(":")
            yield str(name)
            self._take_comma_before("}")
        self._take("}")

    def skip_value(self) -> None:
        """Read the next value, an array element by element."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def _take_comma_before(self, end: str) -> None:
        if self.peek() != end:
            self._take(",")
            if self.peek() == end:
                raise self._error(f"{end} follows a comma")

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self._error(f"{character} is missing" if found else "it ends too early")
        self._position += 1

    def _read(self, length: int = 0) -> None:
        """Read more text, at least as much as there is, so that a long value is not decoded often."""
        more = self._file.read(max(READ_BYTES, length))
        self._text = self._text[self._position :] + more
        self._position = 0
        self._is_complete = not more

    def _error(self, reason: str) -> SourceError:
        return SourceError(f"the file is not JSON, or is damaged, at row {self._row:,}: {escape(reason)}")


def _rows_in_object(text: JsonText, array: str) -> Iterator[tuple[Any, int]]:
    has_array = False
    for name in text.members():
        if name == array and text.peek() == "[":
            has_array = True
            yield from text.elements()
        else:
            text.skip_value()
    if not has_array:
        raise SourceError(f"the object has no array {array}; write one row per line, such as with jq -c")


def _read_head(file: BufferedReader) -> list[bytes]:
    """Return the lines of a file up to the second one that is not blank."""
    lines: list[bytes] = []
    while sum(map(bool, map(bytes.strip, lines))) < HEAD_LINES and (
        line := file.readline(MAX_LINE_BYTES + 1)
    ):
        lines.append(line)
    return lines


def _read_lines(file: BufferedReader) -> Iterator[bytes]:
    """Yield the lines of a file, each truncated to just over MAX_LINE_BYTES."""
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        yield line
        while line and not line.endswith(b"\n"):  # skip the rest of a line that is too long
            line = file.readline(MAX_LINE_BYTES)
        line = file.readline(MAX_LINE_BYTES + 1)


def _open_utf8(file: BufferedReader) -> BufferedReader:
    """Return a file in UTF-8: the same one, unless it is in UTF-16 with a byte order mark."""
    if not file.peek(2).startswith(UTF_16):
        return file
    decoder = codecs.getincrementaldecoder("utf-16")()

    def read(size: int) -> bytes:
        try:
            while data := file.read1(size // 2):  # a character can take 1.5 times as many bytes in UTF-8
                if text := decoder.decode(data):
                    return text.encode()
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise SourceError(f"the file is not UTF-16: {error.reason}") from None
        return b""

    return _open(read)


def _open(read: Callable[[int], bytes], head: bytes = b"") -> BufferedReader:
    return BufferedReader(Stream(read, head))


class Stream(RawIOBase):
    """A stream of `head` and what a function reads."""

    def __init__(self, read: Callable[[int], bytes], head: bytes) -> None:
        self._read = read
        self._head = head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _parse_object(line: bytes) -> Values:
    check_size(line)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(f"the line is not JSON: {error.msg}, at column {error.colno:,}") from None
    if not isinstance(value, dict):
        raise MalformedMessage("the line is JSON, but not an object")
    return value
