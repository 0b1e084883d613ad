"""JSON: lines, one array, or an object with one array."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from decimal import Decimal
from io import BufferedReader, RawIOBase, TextIOWrapper
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import Message

from roster.errors import InvalidField, MalformedMessage, RosterError
from roster.v1.bulk_pb2 import RowFailure
from service.cli.columns import ERROR, Columns
from service.cli.formats.base import (
    MAX_LINE_BYTES,
    SourceError,
    check_size,
    error_of,
    json_reject,
    unparsed_reject,
)
from service.cli.formats.write import json_line
from service.cli.rows import Row, Values
from service.escape import escape

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READ_BYTES = 1 << 16
HEAD_LINES = 2
# Python's int() reads a few more: https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
MAX_DIGITS = 4000
MAX_SHOWN_BYTES = 40
WHITESPACE = " \t\r\n"
MEMBER = re.compile(rb'"\s*:')  # after the name of a member; also inside a text
RECORD_SEPARATOR = b"\x1e"  # begins a row of a JSON text sequence: https://www.rfc-editor.org/rfc/rfc7464
LINE_ENDS = str.maketrans("\r\n", "  ")  # in a document, these stand between values only
MAX_SHOWN_NAMES = 10


class RepeatedName(dict[str, Any]):
    """An object that has a name more than once. JSON does not say which value counts.

    See https://www.rfc-editor.org/rfc/rfc8259#section-4.
    """


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else RepeatedName(value)


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MAX_DIGITS else Decimal(digits)


# It reads what Python writes and orjson refuses: NaN, infinity and integers of any size.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


class Element(NamedTuple):
    """A value of a document, and its text."""

    value: Any
    text: str


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
        array: str | None = self.columns.entity.name
        if file.seekable():
            with closing(JsonText(whole)) as text:
                array = self._find_array(text)
            file.seek(0)
            whole = _open_utf8(file)
        with closing(JsonText(whole)) as text:
            yield from self._document(text, array)

    def _has_a_row_per_line(self, head: list[bytes]) -> bool:
        """Return whether the first line is a row, or the second one: the first may be damaged.

        Raises SourceError if the file is not JSON, or if neither has a known column.
        """
        lines = list(filter(None, map(bytes.strip, map(_without_mark, head))))
        is_json = [line.startswith((b"{", b"[")) for line in lines]
        if lines and not any(is_json):
            shown = escape(lines[0][:MAX_SHOWN_BYTES].decode(errors="replace"))
            raise SourceError(f"the file is not JSON: it begins with {shown}; if it is CSV, add --format csv")
        if not lines or not is_json[0]:
            return True  # each line that is not JSON fails
        for index, line in enumerate(lines):
            if line.startswith(b"["):
                return False
            row = _read_object(line)
            if row is None:
                continue
            arrays = [name for name, value in row.items() if isinstance(value, list)]
            if self.columns.entity.name in arrays or (arrays and not self.columns.count_known(row)):
                return False
            self._check_columns(row, filter(None, map(_read_object, lines[index + 1 :])))
            return True
        return False

    def _check_columns(self, row: Values, others: Iterable[Values] = ()) -> None:
        """Raise SourceError if a column of the first row may be misspelt, or if no row has a known one."""
        try:
            self.columns.fields_of(list(row))
        except InvalidField as error:
            raise SourceError(error.message) from None
        if row and not any(map(self.columns.count_known, [row, *others])):
            shown = escape(", ".join(list(row)[:MAX_SHOWN_NAMES]))
            raise SourceError(
                f"the first row has none of the columns {', '.join(self.columns.names)}; it has {shown}; "
                f"{self._advice(row)}"
            )

    def _advice(self, row: Values) -> str:
        """Return what to do about a row without known columns."""
        objects = [name for name, value in row.items() if isinstance(value, dict)]
        with_rows = [name for name in objects if self.columns.count_known(row[name])]
        if not with_rows:
            return "name the columns with --columns, such as --columns email=Mail"
        path = ".[]" if len(with_rows) == len(row) else f".{escape(with_rows[0])}"
        return f"the columns are inside; extract them, such as with jq -c '{path}'"

    def _lines(self, file: BufferedReader) -> Iterator[Row[Any]]:
        for number, line in enumerate(_read_lines(file), start=1):
            if line.strip():
                yield Row(number, len(line), line, self._parse_line)

    def _parse_line(self, line: bytes) -> Message:
        return self.columns.to_message(_parse_object(line))

    def _document(self, text: "JsonText", array: str | None) -> Iterator[Row[Any]]:
        for number, element in enumerate(self._values(text, array), start=1):
            if number == 1 and isinstance(element.value, dict):
                self._check_columns(element.value)
            yield Row(number, len(element.text), element, self._parse_element)

    def _find_array(self, text: "JsonText") -> str | None:
        """Return the name of the array of rows in the first object; None if the object is itself a row.

        Raises SourceError if it has several arrays.
        """
        if text.peek() != "{":
            return None
        arrays, is_row = [], False
        for name in text.members():
            is_array = text.peek() == "["
            if is_array and name == self.columns.entity.name:
                return name
            if is_array:
                arrays.append(name)
            is_row = is_row or self.columns.count_known([name]) > 0
            text.skip_value()
        if is_row:
            return None
        if len(arrays) > 1:
            shown = escape(", ".join(arrays[:10]))
            raise SourceError(
                f"the object has several arrays ({shown}); extract the one that has the rows, such as with "
                f"jq '.{arrays[0]}' FILE"
            )
        return arrays[0] if arrays else None

    def _values(self, text: "JsonText", array: str | None) -> Iterator[Element]:
        """Yield the rows of a document."""
        while start := text.peek():
            if start == "[":
                yield from text.elements()
            elif start == "{" and array:
                yield from _rows_in_object(text, array)
            else:
                yield text.value()

    def _parse_element(self, element: Element) -> Message:
        if not isinstance(element.value, dict):
            raise MalformedMessage("the row is JSON, but not an object")
        _refuse_repeated_name(element.value)
        return self.columns.to_message(element.value)

    def rejects_header(self) -> bytes:
        return b""

    def reject(self, row: Row[Any], failure: RowFailure) -> bytes:
        """Return the text of a row with the error as its last member: parsing can alter numbers."""
        if isinstance(row.original, Element):
            value, text = row.original.value, row.original.text.translate(LINE_ENDS)
        else:
            value, text = None, row.original.strip().decode(errors="backslashreplace")
            with suppress(RosterError):
                value = _parse_object(row.original)
        if not isinstance(value, dict) or isinstance(value, RepeatedName):
            return unparsed_reject(text, row, failure)
        if ERROR in value:  # the row is from a file of rejects
            value = {name: other for name, other in value.items() if name != ERROR}
            text = _without_last_member(text)
            if _read_object(text.encode(errors="surrogatepass")) != value:
                return json_reject(value, row, failure)
        error = json_line(error_of(row, failure)).decode().strip()
        comma = "," if value else ""
        return escape(f'{text.rstrip()[:-1]}{comma}"{ERROR}":{error}}}').encode() + b"\n"


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

    def value(self) -> Element:
        """Return the next value."""
        self.peek()
        while True:
            length = len(self._text) - self._position
            try:
                value, end = DECODER.raw_decode(self._text, self._position)
                # The next character may belong to a number.
                if end < len(self._text) or self._is_complete:
                    element = Element(value, self._text[self._position : end])
                    self._position = end
                    return element
            except RecursionError:
                raise self._error("a value is nested too deeply") from None
            except ValueError as error:
                if self._is_complete or length > MAX_LINE_BYTES:
                    raise self._error(getattr(error, "msg", "a number has too many digits")) from None
            self._read(length)

    def elements(self) -> Iterator[Element]:
        """Yield the elements of the array that comes next."""
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
            name = self.value().value
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


def _rows_in_object(text: JsonText, array: str) -> Iterator[Element]:
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
    line = file.readline(MAX_LINE_BYTES + 1)
    while line:
        yield _without_mark(line)
        while line and not line.endswith(b"\n"):  # skip the rest of a line that is too long
            line = file.readline(MAX_LINE_BYTES)
        line = file.readline(MAX_LINE_BYTES + 1)


def _without_mark(line: bytes) -> bytes:
    """Return a line without the mark before it: files with byte order marks may have been put together."""
    return line.removeprefix(codecs.BOM_UTF8).removeprefix(RECORD_SEPARATOR)


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
    value = _decode_object(line)
    _refuse_repeated_name(value)
    return value


def _decode_object(line: bytes) -> Values:
    """Return the object of a line, as a RepeatedName if it is one; raises MalformedMessage, TooLarge."""
    check_size(line)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            value = DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            message = f"the line is not JSON: {error.msg}, at column {error.colno:,}"
            raise MalformedMessage(message) from None
    if not isinstance(value, dict):
        raise MalformedMessage("the line is JSON, but not an object")
    if _may_repeat_a_name(line, value):
        with suppress(ValueError, RecursionError):
            again = DECODER.decode(line.decode())
            if isinstance(again, RepeatedName):
                return again
    row: Values = value
    return row


def _without_last_member(text: str) -> str:
    """Return the text of an object without its member `_error`, which ends it."""
    before = text[: text.rindex(f'"{ERROR}"')]
    return before.rstrip().removesuffix(",") + "}"


def _may_repeat_a_name(line: bytes, value: Values) -> bool:
    """Return whether a line has more members than the object that orjson made of it.

    They may be inside others, or only look like members in a text. A colon follows each name.
    """
    return line.count(b":") > len(value) and len(MEMBER.findall(line)) > len(value)


def _refuse_repeated_name(value: Any) -> None:
    if isinstance(value, RepeatedName):
        raise MalformedMessage("the object has a name more than once; keep one of them")


def _read_object(line: bytes) -> Values | None:
    try:
        return _decode_object(line)
    except RosterError:
        return None
