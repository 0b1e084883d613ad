"""Keyset pages and their tokens.

A page begins after the last sort key of the previous page. The index finds that key, so all pages cost the
same. A token contains a version, a fingerprint of the listing, the key and a checksum. It gives access to
nothing that a filter does not. A token with texts, such as an e-mail, is encrypted: tokens get into the logs
and caches of callers.
"""

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any, Generic, TypeAlias, TypeVar

from sqlalchemy import ColumnElement, FromClause, String, tuple_

from roster.errors import InvalidField, InvalidPageToken
from service.db.base import Expression, UtcDateTime
from service.db.token_cipher import TokenCipher
from service.validation import MAX_ID
from service.wire import EPOCH, MICROSECOND

VERSION = b"\x01"
ENCRYPTED = b"\x02"  # the version of encrypted tokens
FINGERPRINT_BYTES = 8
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

RowT = TypeVar("RowT")
SortKey: TypeAlias = Sequence[Any]  # the values of a row in the columns that a listing is sorted by


@dataclass(frozen=True)
class Page(Generic[RowT]):
    """Rows in order, and the sort key of the last one if others follow."""

    rows: Sequence[RowT]
    next_key: SortKey | None


@dataclass(frozen=True)
class ListQuery:
    """The rows of a page: which, in which order, after which key, and how many."""

    conditions: Sequence[ColumnElement[bool]]
    keyset: "Keyset"
    after: SortKey | None
    limit: int
    fingerprint: bytes = b""
    cipher: TokenCipher | None = None  # of its page tokens, if they are encrypted
    is_cacheable: bool = True  # whether SQLAlchemy may keep the compiled statement

    def next_token(self, page: Page[Any]) -> str:
        """Return the token of the next page, "" on the last one."""
        return encode_token(self.fingerprint, page.next_key, self.cipher)


@dataclass(frozen=True)
class Keyset:
    """An order by columns that are unique together, all in the same direction."""

    columns: Sequence[Expression]
    descending: bool = False

    def order(self) -> list[Expression]:
        """Return the ORDER BY."""
        if self.descending:
            return [column.desc() for column in self.columns]
        return [column.asc() for column in self.columns]

    def of(self, rows: FromClause) -> "Keyset":
        """Return the same order for the rows of a subquery."""
        return Keyset([rows.c[column.key] for column in self.columns if column.key], self.descending)

    def key_of(self, row: Any) -> SortKey:
        """Return the sort key of a row, with times as datetimes."""
        return [convert(getattr(row, name)) for name, convert in self._values]

    @cached_property
    def has_texts(self) -> bool:
        """Whether a sort key contains texts, which can be personal data."""
        return any(isinstance(column.type, String) for column in self.columns)

    @cached_property
    def _values(self) -> list[tuple[str, Callable[[Any], Any]]]:
        """The name of each column, and the function that converts its value."""
        return [
            (str(column.key), _to_datetime if isinstance(column.type, UtcDateTime) else lambda value: value)
            for column in self.columns
        ]

    def after(self, key: SortKey) -> ColumnElement[bool]:
        """Return the condition that a row comes after the key: one comparison, since OR uses no index."""
        left, right = tuple_(*self.columns), tuple_(*key)
        return left < right if self.descending else left > right


def page_size(requested: int) -> int:
    """Return the number of rows in a page: 50 for 0, at most 1000; raises InvalidField."""
    if requested < 0:
        raise InvalidField("page_size must not be negative; 0 means 50", field="page_size")
    return min(requested, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE


@lru_cache
def fingerprint(*listing: object) -> bytes:
    """Return a digest of the resource, filter, order and scope of a listing, which ties its tokens to it."""
    return sha256(json.dumps(listing, default=str).encode()).digest()[:FINGERPRINT_BYTES]


def encode_token(listing: bytes, key: SortKey | None, cipher: TokenCipher | None = None) -> str:
    """Return the token of the page that begins after the key, "" if there is no key."""
    if key is None:
        return ""
    body = listing + json.dumps(key, default=datetime.isoformat, separators=(",", ":")).encode()
    if cipher and cipher.is_in_use:
        return _to_base64(ENCRYPTED + cipher.encrypt(body))
    return _to_base64(VERSION + zlib.crc32(body).to_bytes(4, "big") + body)


def check_token(token: str) -> None:
    """Check that a token is not damaged, before its listing is known; raises InvalidPageToken."""
    if token:
        _decode(token, None)


def decode_token(
    listing: bytes, token: str, columns: Sequence[Expression], cipher: TokenCipher | None = None
) -> SortKey | None:
    """Return the key in a token, None for an empty one; raises InvalidPageToken.

    With a cipher, it also reads tokens that are not encrypted: earlier releases have made them.
    """
    if not token:
        return None
    body = _decode(token, cipher)
    if body[:FINGERPRINT_BYTES] != listing:
        raise _token_of_another_listing()
    try:
        values = json.loads(body[FINGERPRINT_BYTES:])
        return [_check_type(value, column) for value, column in zip(values, columns, strict=True)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise _damaged_token() from None


def _decode(token: str, cipher: TokenCipher | None) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except ValueError:
        raise _damaged_token() from None
    if _to_base64(raw) != token:  # the decoder ignores some characters, and some bits of the last one
        raise _damaged_token()
    version, rest = raw[:1], raw[1:]
    if version == ENCRYPTED:
        return _decrypt(rest, cipher)
    checksum, body = rest[:4], rest[4:]
    if version != VERSION or zlib.crc32(body).to_bytes(4, "big") != checksum:
        raise _damaged_token()
    return body


def _decrypt(encrypted: bytes, cipher: TokenCipher | None) -> bytes:
    if cipher is None:
        raise _token_of_another_listing("is damaged or ")
    try:
        return cipher.decrypt(encrypted)
    except LookupError:
        raise InvalidPageToken(
            "page_token has expired or is damaged; start without a token", field="page_token"
        ) from None
    except ValueError:
        raise _damaged_token() from None


def _to_base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _to_datetime(value: Any) -> Any:
    return EPOCH + value * MICROSECOND if isinstance(value, int) else value


def _check_type(value: Any, column: Expression) -> Any:
    # Anyone can forge a token with a valid checksum: the driver must get only values that it can send.
    if isinstance(column.type, UtcDateTime):
        return datetime.fromisoformat(value).astimezone(UTC)
    if type(value) is not column.type.python_type:
        raise TypeError
    if not (0 <= value <= MAX_ID if isinstance(value, int) else b"\0" not in value.encode()):
        raise ValueError
    return value


def _damaged_token() -> InvalidPageToken:
    return InvalidPageToken(
        "page_token is damaged; send next_page_token unchanged, or none for the first page",
        field="page_token",
    )


def _token_of_another_listing(doubt: str = "") -> InvalidPageToken:
    return InvalidPageToken(
        f"page_token {doubt}belongs to another listing; for a new filter or order_by, start without a token",
        field="page_token",
    )
