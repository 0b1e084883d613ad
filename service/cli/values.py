"""Values as files write them, and the types of fields that they become."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from roster.errors import InvalidField

# Floats, as pandas writes ids of a column with missing values, are exact below this.
MAX_EXACT_FLOAT = 1 << 53
INTEGER = re.compile(r"([-+]?[0-9]{1,19})(?:\.0*)?")
# As PostgreSQL reads text: any prefix of a word that fits only one of them.
WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
BOOLEANS = {word[:end]: value for word, value in WORDS.items() for end in range(1, len(word) + 1)}
del BOOLEANS["o"]
BOOLEANS |= {"1.0": True, "0.0": False}  # as pandas writes a column of 0 and 1 with missing values
# What datetime.fromisoformat does not read: `UTC` as BigQuery writes it, and offsets after a space.
TIME = re.compile(
    r"(?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?)"
    r" ?(?:[Zz]|UTC|GMT|(?P<offset>[-+][0-9]{2}(?::?[0-9]{2})?))"
)
SURROGATE = re.compile("[\ud800-\udfff]")
# PostgreSQL, MySQL, SQL Server, DBeaver, DataGrip, R, Excel and pandas write these into CSV for null.
# `Null`, `Na` and `Nan`, spelt like this, are names.
NULL_WORDS = frozenset(
    (
        r"\N",
        "NULL",
        "null",
        "(null)",
        "<null>",
        "[NULL]",
        "NA",
        "N/A",
        "#N/A",
        "<NA>",
        "NaN",
        "nan",
        "None",
        "nil",
    )
)


def text(name: str, value: Any) -> str:
    """Return a string unchanged, and bytes decoded from UTF-8; raises InvalidField."""
    if isinstance(value, str) and value.isascii():  # nearly all
        return value
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
        raise InvalidField(f"{name} must be UTF-8", field=name)
    if not isinstance(value, str):
        raise InvalidField(f"{name} must be a string", field=name)
    if SURROGATE.search(value):
        raise InvalidField(f"{name} must be valid Unicode; it has half of a surrogate pair", field=name)
    return value


def integer(name: str, value: Any) -> int:
    """Return an integer, also one written as text, `7.0` or a decimal; raises InvalidField."""
    number = _whole(value)
    if number is not None and -(1 << 63) <= number < 1 << 63:
        return number
    raise InvalidField(f"{name} must be an integer of at most 64 bits", field=name)


def _whole(value: Any) -> int | None:
    if isinstance(value, str | bytes):
        found = INTEGER.fullmatch(_ascii(value))
        return int(found[1]) if found else None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < MAX_EXACT_FLOAT else None
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else None
    return value if type(value) is int else None


def boolean(name: str, value: Any) -> bool:
    """Return a boolean, as PostgreSQL reads text, or from 0 or 1; raises InvalidField."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in BOOLEANS:  # nearly all
        return BOOLEANS[value]
    word = str(_whole(value)) if isinstance(value, int | float | Decimal) else value
    if isinstance(word, str | bytes) and (known := BOOLEANS.get(_ascii(word).lower())) is not None:
        return known
    raise InvalidField(f"{name} must be true or false (yes/no and 1/0 work too)", field=name)


def timestamp(name: str, value: Any) -> datetime:
    """Return a time with a time zone, truncated to microseconds; raises InvalidField."""
    time = value if isinstance(value, datetime) else _time_from_text(value)
    if time is not None and time.tzinfo:
        with suppress(OverflowError):
            return time.astimezone(UTC)
    raise InvalidField(
        f"{name} must be a time with a time zone, such as 2024-01-31T09:30:00Z or 2024-01-31 09:30:00+01",
        field=name,
    )


def _time_from_text(value: Any) -> datetime | None:
    if not isinstance(value, str | bytes):
        return None
    text = _ascii(value)
    found = TIME.fullmatch(text)
    with suppress(ValueError):  # such as month 13
        return datetime.fromisoformat(f"{found['time'].upper()}{found['offset'] or 'Z'}" if found else text)
    return None


def _ascii(value: str | bytes) -> str:
    """Return text without surrounding spaces; bytes that are not ASCII match nothing."""
    return (value if isinstance(value, str) else value.decode("ascii", "replace")).strip()


PARSERS: Mapping[int, Callable[[str, Any], Any]] = {
    FieldDescriptor.TYPE_STRING: text,
    FieldDescriptor.TYPE_INT64: integer,
    FieldDescriptor.TYPE_BOOL: boolean,
    FieldDescriptor.TYPE_MESSAGE: timestamp,
}
