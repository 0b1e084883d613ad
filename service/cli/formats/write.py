"""Writes rows as NDJSON and CSV."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import chain
from types import NoneType
from typing import Any

import orjson

from service.cli.rows import Values
from service.cli.terminal import UsageError
from service.cli.values import NULL_WORDS

SPECIAL = re.compile(r'[",\r\n]|\A\ufeff')
SPECIAL_IN_ANY = re.compile(r'[",\r\n\ufeff]')
BOOLEANS = {True: "true", False: "false", None: ""}
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001  (in UTC; without a time zone it is written faster)


class Quoted(str):
    """A text that is written in quotes, so that it does not mean null."""

    __slots__ = ()


def json_line(values: Values) -> bytes:
    """Return values as a line of JSON; raises JSONEncodeError."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME
    return orjson.dumps(values, default=_text, option=option)


def json_lines(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Return rows as lines of JSON."""
    names, rows = [*columns], zip(*columns.values(), strict=True)
    option = orjson.OPT_APPEND_NEWLINE
    return b"".join([orjson.dumps(dict(zip(names, row, strict=True)), option=option) for row in rows])


def csv_lines(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Return rows as lines of CSV, like `csv_line`, but with words such as NULL in quotes: they are text."""
    rows = zip(*map(_cells, columns.values()), strict=True)
    return "".join([f"{','.join(cells)}\n" for cells in rows]).encode()


def time_texts(columns: Iterable[Sequence[int]]) -> list[list[str]]:
    """Return columns of microseconds since 1970 as times of RFC 3339 in UTC, with six digits.

    Many times are equal: those of one load, and both of a row that was never changed.
    """
    texts = {moment: _time_text(moment) for moment in set(chain.from_iterable(columns))}
    return [list(map(texts.__getitem__, column)) for column in columns]


def _time_text(moment: int) -> str:
    time = EPOCH + timedelta(0, *divmod(moment, 1_000_000))
    return f"{time.isoformat(timespec='microseconds')}Z"


def csv_line(values: Iterable[Any]) -> bytes:
    """Return values as a line of CSV: None is an empty cell, an empty string is `""`.

    Python's csv module can't write these differently before Python 3.12. Bytes that were not UTF-8 are
    written as they were.
    """
    line = f"{','.join(map(_cell, values))}\n"
    try:
        return line.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, as UTF-7 and UTF-16 can contain
        return line.encode(errors="backslashreplace")


def _cells(values: Sequence[Any]) -> Iterable[str]:
    """Return the cells of a column: few have values that need a look at each."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        return map(str, values)
    if kinds <= {bool, NoneType}:
        return map(BOOLEANS.__getitem__, values)
    is_plain = "" not in values and NULL_WORDS.isdisjoint(values)
    if is_plain and not SPECIAL_IN_ANY.search("".join(filter(None, values))):
        return [value or "" for value in values]
    return [_cell(_quote_null_word(value)) for value in values]


def _quote_null_word(value: Any) -> Any:
    return Quoted(value) if isinstance(value, str) and value in NULL_WORDS else value


def quote(text: str) -> str:
    """Return a text as a quoted cell of CSV."""
    return '"' + text.replace('"', '""') + '"'


def pyarrow() -> Any:
    """Return the pyarrow module; raises UsageError if it is not installed."""
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UsageError("Parquet requires pyarrow; in a clone: .venv/bin/pip install pyarrow") from None
    return pyarrow


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _text(value)
    needs_quotes = not text or isinstance(value, Quoted) or SPECIAL.search(text)
    return quote(text) if needs_quotes else text


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    text = str(value)
    return text.lower() if isinstance(value, bool) else text
