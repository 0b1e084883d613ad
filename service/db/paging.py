"""Keyset pages and their tokens.

A page begins after the sort key of the page before it, found by the index, so that it costs the
same at any depth. A token is that key, with a version, a fingerprint of the listing it belongs to
and a checksum; it is no secret and gives no right that a filter doesn't.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, FromClause, tuple_

from service.db.base import UtcDateTime
from service.errors import InvalidField, InvalidPageToken
from service.validation import MAX_ID
from service.wire import EPOCH, MICROSECOND

VERSION = b"\x01"
FINGERPRINT_BYTES = 8
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Page(Generic[RowT]):
    """Rows in order, and the sort key of the last one where more follow."""

    rows: Sequence[RowT]
    next_key: list[Any] | None


@dataclass(frozen=True)
class Keyset:
    """An order by columns that together are unique, all in one direction."""

    columns: Sequence[ColumnElement[Any]]
    descending: bool = False

    def order(self) -> list[ColumnElement[Any]]:
        """Return the ORDER BY."""
        return [column.desc() if self.descending else column.asc() for column in self.columns]

    def of(self, rows: FromClause) -> "Keyset":
        """Return the same order of a subquery's rows."""
        return Keyset([rows.c[column.key] for column in self.columns if column.key], self.descending)

    def key_of(self, row: Any) -> list[Any]:
        """Return the sort key of a row, of an entity or of columns, as a token has it."""
        return [_as_sent(getattr(row, str(column.key)), column) for column in self.columns]

    def after(self, key: Sequence[Any]) -> ColumnElement[bool]:
        """Return that a row comes after the key: one row comparison, since OR would not use the index."""
        left, right = tuple_(*self.columns), tuple_(*key)
        return left < right if self.descending else left > right


def page_size(requested: int) -> int:
    """Return the number of rows in a page: 50 for 0, at most 1000; raises InvalidField."""
    if requested < 0:
        raise InvalidField("page_size must not be negative; 0 means 50", field="page_size")
    return min(requested, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE


def fingerprint(*listing: object) -> bytes:
    """Return what ties a token to its listing: the method, the filter, the order."""
    return sha256(json.dumps(listing, default=str).encode()).digest()[:FINGERPRINT_BYTES]


def encode_token(listing: bytes, key: Sequence[Any] | None) -> str:
    """Return the token of the page that begins after the key, "" where there is none."""
    if key is None:
        return ""
    values = [value.isoformat() if isinstance(value, datetime) else value for value in key]
    body = listing + json.dumps(values, separators=(",", ":")).encode()
    return _written(VERSION + zlib.crc32(body).to_bytes(4, "big") + body)


def decode_token(listing: bytes, token: str, columns: Sequence[ColumnElement[Any]]) -> list[Any] | None:
    """Return the key in a token, None for an empty one; raises InvalidPageToken."""
    if not token:
        return None
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except ValueError:
        raise _damaged() from None
    version, checksum, body = raw[:1], raw[1:5], raw[5:]
    # The decoder passes over characters, and over bits of the last one, that mean nothing.
    if version != VERSION or zlib.crc32(body).to_bytes(4, "big") != checksum or _written(raw) != token:
        raise _damaged()
    if body[:FINGERPRINT_BYTES] != listing:
        raise InvalidPageToken(
            "page_token belongs to another listing; with a new filter or order_by begin without a token",
            field="page_token",
        )
    try:
        values = json.loads(body[FINGERPRINT_BYTES:])
        return [_typed(value, column) for value, column in zip(values, columns, strict=True)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise _damaged() from None


def _written(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _as_sent(value: Any, column: ColumnElement[Any]) -> Any:
    if isinstance(column.type, UtcDateTime) and isinstance(value, int):
        return EPOCH + value * MICROSECOND
    return value


def _typed(value: Any, column: ColumnElement[Any]) -> Any:
    # Anybody can make a token with the right checksum: no value may get to the driver that it can't send.
    if isinstance(column.type, UtcDateTime):
        return datetime.fromisoformat(value).astimezone(UTC)
    if type(value) is not column.type.python_type:
        raise TypeError
    if not (0 <= value <= MAX_ID if isinstance(value, int) else b"\0" not in value.encode()):
        raise ValueError
    return value


def _damaged() -> InvalidPageToken:
    return InvalidPageToken(
        "page_token is damaged; pass next_page_token as it came, or none for the first page",
        field="page_token",
    )
