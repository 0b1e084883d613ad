"""Writes rows as NDJSON and CSV."""

import re
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from typing import Any

import orjson

from service.cli.rows import Values
from service.cli.terminal import UsageError

SPECIAL = re.compile(r'[",\r\n]|\A\ufeff')
# What databases and their tools write for null, such as MySQL, SQL Server and DataGrip.
NULL_WORDS = frozenset(["\\N", "NULL", "null", "<null>", "[NULL]", "(null)"])


def json_line(values: Values) -> bytes:
    """Return values as a line of JSON; raises JSONEncodeError."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME
    return orjson.dumps(values, default=_text, option=option)


def csv_line(values: Iterable[Any], *, quotes_nulls: bool = True) -> bytes:
    """Return values as a line of CSV: None is an empty cell, an empty string is `""`.

    Python's csv module can't write these differently before Python 3.12. Bytes that were not UTF-8 are
    written as they were. A text that others take for null has quotes, unless `quotes_nulls` is false.
    """
    cells = map(partial(_cell, quotes_nulls=quotes_nulls), values)
    return f"{','.join(cells)}\n".encode(errors="surrogateescape")


def pyarrow() -> Any:
    """Return the pyarrow module; raises UsageError if it is not installed."""
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UsageError("Parquet requires pyarrow: pip install pyarrow") from None
    return pyarrow


def _cell(value: Any, *, quotes_nulls: bool) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _text(value)
    needs_quotes = not text or SPECIAL.search(text) or (quotes_nulls and text in NULL_WORDS)
    return '"' + text.replace('"', '""') + '"' if needs_quotes else text


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    text = str(value)
    return text.lower() if isinstance(value, bool) else text
