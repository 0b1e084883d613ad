"""Tokens of the change feed: positions in its log.

A position on PostgreSQL is a snapshot: all transactions that it sees have been reported. Ids and xids are no
positions: a transaction draws them long before it commits, and one with higher ids may commit before it.

The changes between a snapshot and a later one are a window, which may take several pages. A token in the
middle of a window has both snapshots, and the entry where the next page begins. On SQLite, which has one
writer at a time, a position is the id of an entry.
"""

import base64
import binascii
import json
import re
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from roster.errors import InvalidField
from roster.v1.changes_pb2 import Change
from service.changes.model import MAX_IDS

VERSION = b"\x01"
CHECKSUM_BYTES = 4
# Snapshots have the ids of all open transactions. This is enough for 20,000, and takes some milliseconds.
MAX_BYTES = 1 << 18
MAX_NUMBER = (1 << 63) - 1
ENTRY_ID = re.compile("[0-9]{1,19}")
SNAPSHOT = re.compile(r"\d{1,19}:\d{1,19}:(\d{1,19}(,\d{1,19})*)?", re.ASCII)
FEED_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Token:
    """A position in the log of a feed; `entities` are those it was made for, none stands for any.

    `since` is a snapshot as PostgreSQL writes it, or the id of an entry on SQLite. In the middle of a window,
    `until` is the snapshot that ends it, and the next page begins in the entry (xid, id), at `offset` of its
    ids.
    """

    feed_id: str
    since: str
    until: str = ""
    xid: int = 0
    id: int = 0
    offset: int = 0
    entities: tuple[int, ...] = ()

    def __str__(self) -> str:
        body = zlib.compress(json.dumps([*asdict(self).values()], separators=(",", ":")).encode())
        checksum = zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "big")
        return base64.urlsafe_b64encode(VERSION + checksum + body).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str, entities: Collection[int]) -> "Token":
        """Return the token in a request for these entities; raises InvalidField."""
        token = _parse(text)
        if token.entities and not set(entities) <= set(token.entities):
            raise InvalidField(
                f"token was made for {_names(token.entities)} only; ask for these, or begin with the "
                "watch_token of an export",
                field="token",
            )
        return token.for_entities(entities)

    def for_entities(self, entities: Collection[int]) -> "Token":
        """Return the same position for these entities."""
        return replace(self, entities=tuple(sorted(entities)))

    @property
    def is_snapshot(self) -> bool:
        """Whether it is of PostgreSQL."""
        return ":" in self.since

    @property
    def is_in_window(self) -> bool:
        """Whether the window that it has begun goes on."""
        return bool(self.until)

    @cached_property
    def oldest_xid(self) -> int:
        """The lowest xid, or id on SQLite, of which entries may still be read."""
        xmin = int(self.since.partition(":")[0])
        if self.is_in_window:
            return min(self.xid, int(self.until.partition(":")[0]))
        return xmin if self.is_snapshot else xmin + 1

    @cached_property
    def next_xid(self) -> int:
        """The first xid that was not given when the token was made; on SQLite the id of its last entry."""
        numbers = (self.until or self.since).split(":")
        return int(numbers[1] if len(numbers) > 1 else numbers[0])


def snapshot_below(snapshot: str, xid: int) -> str:
    """Return what a snapshot says about the transactions below an xid: it sees none of the others."""
    xmin, xmax, open_xids = snapshot.split(":")
    remaining = [number for number in open_xids.split(",") if number and int(number) < xid]
    return f"{min(int(xmin), xid)}:{min(int(xmax), xid)}:{','.join(remaining)}"


def _names(entities: Collection[int]) -> str:
    known = Change.Entity.DESCRIPTOR.values_by_number
    return " and ".join(value.name for number, value in known.items() if number in entities)


def _parse(text: str) -> Token:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        checksum, body = raw[1 : 1 + CHECKSUM_BYTES], raw[1 + CHECKSUM_BYTES :]
        is_intact = raw[:1] == VERSION and zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "big") == checksum
        # Anyone can forge a token with a valid checksum.
        inflated = zlib.decompressobj()
        feed_id, since, until, xid, id, offset, entities = json.loads(inflated.decompress(body, MAX_BYTES))
        token = Token(feed_id, since, until, xid, id, offset, tuple(entities))
        _check(token, is_intact=is_intact)
    except (ValueError, TypeError, RecursionError, zlib.error, binascii.Error):
        raise InvalidField(
            "token is damaged; send the token of a response unchanged, or none to begin now", field="token"
        ) from None
    return token


def _check(token: Token, *, is_intact: bool) -> None:
    """Raise ValueError or TypeError for what this service does not write, which PostgreSQL might refuse."""
    if not is_intact:
        raise ValueError("another version, or a wrong checksum")
    numbers = (token.xid, token.id, token.offset, *token.entities)
    if not all(type(number) is int and 0 <= number <= MAX_NUMBER for number in numbers):
        raise ValueError("a number is out of range")
    if token.offset > MAX_IDS:
        raise ValueError("entries have fewer ids")
    if not isinstance(token.until, str):
        raise TypeError("not a snapshot")
    if not FEED_ID.fullmatch(token.feed_id):
        raise ValueError("not the id of a feed")
    if not SNAPSHOT.fullmatch(token.since):
        if not ENTRY_ID.fullmatch(token.since) or int(token.since) > MAX_NUMBER or token.until:
            raise ValueError("not the id of an entry")
        return
    for snapshot in (token.since, *filter(None, [token.until])):
        _check_snapshot(snapshot)


def _check_snapshot(text: str) -> None:
    if not SNAPSHOT.fullmatch(text):
        raise ValueError("not a snapshot")
    xmin, xmax, open_xids = text.split(":")
    xids = [int(xmin), *map(int, filter(None, open_xids.split(",")))]
    is_sorted = xids == sorted(xids) and len(set(xids[1:])) == len(xids) - 1
    if not (xids[0] > 0 and is_sorted and xids[-1] <= int(xmax) <= MAX_NUMBER):
        raise ValueError("not a snapshot")
    if len(xids) > 1 and xids[-1] == int(xmax):
        raise ValueError("not a snapshot")
