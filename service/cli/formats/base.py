"""The protocol of file formats, and rejects as JSON."""

import json
from collections.abc import Iterator
from io import BufferedReader
from math import isinf
from typing import Any, Protocol

import orjson

from roster.errors import TooLarge
from roster.v1.bulk_pb2 import RowFailure
from service.cli.columns import ERROR, Columns
from service.cli.formats.write import json_line
from service.cli.rows import Row, SourceError, Values
from service.escape import escape

__all__ = ["FileFormat", "SourceError", "check_size", "error_of", "json_reject", "shorten", "unparsed_reject"]

MAX_LINE_BYTES = 8 << 20
KEPT_CHARACTERS = 1000  # of a row that is too long, in the rejects
LINE = "_line"


class FileFormat(Protocol):
    """Reads rows from a file, and formats the rows that fail as rejects.

    `name` is a part of the ids of loads; `unit` is what `Row.number` counts; `suffix` is the suffix of a file
    of rejects. `columns` are those of the file.
    """

    name: str
    suffix: str
    unit: str
    columns: Columns

    def rows(self, file: BufferedReader) -> Iterator[Row[Any]]:
        """Yield the rows of a file, not parsed yet; raises SourceError."""
        ...

    def rejects_header(self) -> bytes:
        """Return the beginning of a file of rejects."""
        ...

    def reject(self, row: Row[Any], failure: RowFailure) -> bytes:
        """Return a row with the reason why it failed, as `_error`."""
        ...


def check_size(original: bytes | str) -> None:
    """Raise TooLarge for a row that is too long."""
    if len(original) > MAX_LINE_BYTES:
        raise TooLarge(f"the row is longer than {MAX_LINE_BYTES >> 20} MiB")


def json_reject(values: Values, row: Row[Any], failure: RowFailure) -> bytes:
    """Return a reject as a line of JSON: the values, and the error."""
    if any(map(_is_infinite, values.values())):  # orjson would write null
        return unparsed_reject(json.dumps(values, default=str), row, failure)
    try:
        return _with_error(values, row, failure)
    except orjson.JSONEncodeError:  # such as an integer of more than 64 bits
        return unparsed_reject(json.dumps(values, default=str), row, failure)


def unparsed_reject(text: str, row: Row[Any], failure: RowFailure) -> bytes:
    """Return a reject as a line of JSON: the text of a row without columns, and the error."""
    return _with_error({LINE: shorten(row, text)}, row, failure)


def shorten(row: Row[Any], text: str) -> str:
    """Return the text of a row, its beginning if it is too long."""
    return text if row.size <= MAX_LINE_BYTES else text[:KEPT_CHARACTERS]


def error_of(row: Row[Any], failure: RowFailure) -> Values:
    """Return the error of a reject."""
    return {
        "reason": failure.reason,
        "field": failure.field,
        "message": failure.message,
        "row": row.number,
    }


def _with_error(values: Values, row: Row[Any], failure: RowFailure) -> bytes:
    line = json_line({**values, ERROR: error_of(row, failure)})
    return escape(line.decode().removesuffix("\n")).encode() + b"\n"


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and isinf(value)
