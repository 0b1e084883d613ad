"""Feed: reads pages of changes, each of them with the rows as they are now."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roster.v1.changes_pb2 import Change
from service.changes.kinds import KINDS, Kind, tables_of
from service.changes.log import ChangeLog, Entry, LogPage
from service.changes.token import Token
from service.db.base import ReadSession
from service.db.engine import Database
from service.db.selection import MAX_ROWS_BYTES, Row
from service.wire import timestamp_fields

MAX_CHANGES = 1000  # in a page
# A row comes after the one that it belongs to; deletions come last, the other way around.
FIELDS = [kind.field for kind in KINDS] + [kind.deleted_field for kind in reversed(KINDS)]
ORDER = {field: place for place, field in enumerate(FIELDS)}

RowKey = tuple[str, int]  # the table and the id of a row


class RowTooLarge(Exception):
    """A row does not fit a response; the service writes none that is as large."""


@dataclass(frozen=True)
class ChangePage:
    """The next changes, and the token after them."""

    changes: Sequence[Change]
    token: Token
    has_more: bool = False


@dataclass
class Cut:
    """The changes that fit a response, by row, and where the next page begins if some don't fit."""

    changes: dict[RowKey, Change] = field(default_factory=dict)
    token: Token | None = None


class Feed:
    """Reads changes on the primary."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._log = ChangeLog(database)

    async def now(self) -> Token:
        """Return the current position."""
        return (await self._log.read(None, (), 1)).token

    async def read(self, token: Token, size: int = MAX_CHANGES) -> ChangePage:
        """Return at most `size` changes after a token; raises FeedReset, TokenExpired, RowTooLarge.

        The rows are read after the log, so that none is older than the page's token.
        """
        page = await self._log.read(token, tables_of(token.entities), size)
        if not page.entries:
            return ChangePage([], page.token, page.has_more)
        ids = _ids_by_table(page.entries, size)
        rows = await self._database.run(lambda session: _read_rows(session, ids), None)
        await self._database.loop_turns.next(len(rows))
        cut = _cut(page, rows, size)
        changes = sorted(cut.changes.values(), key=lambda change: ORDER[change.WhichOneof("change") or ""])
        return ChangePage(changes, cut.token or page.token, page.has_more or cut.token is not None)


def _ids_by_table(entries: Sequence[Entry], size: int) -> Mapping[str, Sequence[int]]:
    """Return the ids of the first rows of a page, each once."""
    found: dict[RowKey, None] = {}
    for key in ((entry.table, id) for entry in entries for id in entry.ids):
        if len(found) == size:
            break
        found[key] = None
    return {kind.table: [id for table, id in found if table == kind.table] for kind in KINDS}


async def _read_rows(session: ReadSession, ids: Mapping[str, Sequence[int]]) -> Mapping[RowKey, Row | None]:
    """Return the rows with these ids, None for each that is missing; those that don't fit are left out."""
    rows: dict[RowKey, Row | None] = {}
    for kind in KINDS:
        if wanted := ids[kind.table]:
            found = await kind.repository(session).get_many(wanted)
            rows |= {(kind.table, id): row for id, row in zip(wanted, found, strict=False)}
    return rows


def _cut(page: LogPage, rows: Mapping[RowKey, Row | None], size: int) -> Cut:
    """Return the changes of a page in the order of the log, up to the first one that does not fit.

    Raises RowTooLarge.
    """
    kinds = {kind.table: kind for kind in KINDS}
    cut, total = Cut(), 0
    for entry, position, id in _rows_of(page.entries):
        key = entry.table, id
        if key in cut.changes:
            cut.changes[key].changed_at.FromMicroseconds(entry.changed_at)
            continue
        change = _change(kinds[entry.table], entry, id, rows[key]) if key in rows else None
        total += change.ByteSize() if change else 0
        if change is None or len(cut.changes) == size or total > MAX_ROWS_BYTES:
            if not cut.changes:  # the next page would begin with this row too, and so on for ever
                raise RowTooLarge(
                    f"row {id} of {entry.table} is larger than a response; shorten or delete it"
                )
            cut.token = page.token_at(entry, position)
            break
        cut.changes[key] = change
    return cut


def _rows_of(entries: Sequence[Entry]) -> Iterator[tuple[Entry, int, int]]:
    return ((entry, position, id) for entry in entries for position, id in enumerate(entry.ids))


def _change(kind: Kind, entry: Entry, id: int, row: Row | None) -> Change:
    fields: Any = {kind.deleted_field: id} if row is None else {kind.field: kind.to_fields(row)}
    return Change(**fields, changed_at=timestamp_fields(entry.changed_at))
