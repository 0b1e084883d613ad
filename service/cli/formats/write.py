"""Writes rows as NDJSON and CSV."""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import orjson

from service.cli.rows import Values
from service.cli.terminal import UsageError
from service.cli.values import NULL_WORDS

SPECIAL = re.compile(r'[",\r\n]|\A\ufeff')


class Quoted(str):
    """A text that is written in quotes, so that it does not mean null."""

    __slots__ = ()


def json_line(values: Values) -> bytes:
    """Return values as a line of JSON; raises JSONEncodeError."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME
    return orjson.dumps(values, default=_text, option=option)


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


def csv_row(values: Iterable[Any]) -> bytes:
    """Return the values of a row as a line of CSV, with words such as NULL in quotes: they are text."""
    return csv_line(map(_quote_null_word, values))


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
