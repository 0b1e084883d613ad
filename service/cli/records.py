"""Rows as `roster users` and `roster posts` print them: records and tables for people, JSON for programs."""

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import orjson
from google.protobuf.timestamp_pb2 import Timestamp

from service.cli.table import GAP, Cells, fit
from service.cli.terminal import PAGE_SIZE, echo, wrap
from service.escape import escape

Document: TypeAlias = Mapping[str, Any]

MOST_POSTS = 50  # in the view WITH_POSTS
NUMBERS = frozenset({"id", "author_id", "version", "posts"})
LAST = frozenset({"content"})
TAB_SIZE = 4


def document(message: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return fields as `roster export` writes them: times as text in UTC, None for an unset field.

    A part of a row has unset fields: the answer to an update, if the caller may not read, and that to a dry
    run.
    """
    return {name: _value(message, name) for name in names}


def _value(message: Any, name: str) -> Any:
    value = getattr(message, name)
    # A field without presence, such as an id, is never empty in a stored row.
    has_presence = message.DESCRIPTOR.fields_by_name[name].has_presence
    is_set = message.HasField(name) if has_presence else bool(value)
    if not is_set:
        return None
    if isinstance(value, Timestamp):
        return f"{value.ToDatetime().isoformat(timespec='microseconds')}Z"
    return value


def print_record(row: Document, *, is_json: bool) -> None:
    """Print one row: a line for each field, with a content below the others. Further lines are indented."""
    if is_json:
        _print_json([row])
        return
    width = max(map(len, row)) + len(GAP)
    for name in sorted(row, key=LAST.__contains__):
        text = _text(row[name]).replace("\r\n", "\n").removesuffix("\n")
        first, *others = text.expandtabs(TAB_SIZE).split("\n")
        for line in (f"{name:{width}}{first}", *(" " * width + other for other in others)):
            _print_line(line, width)


def _print_line(line: str, indent: int) -> None:
    echo(*(part.rstrip() for part in wrap([line], indent, sys.stdout)))


class RowPrinter:
    """Prints rows as a table, or as JSON with one object per line.

    A table has the first of `layouts` that fits the terminal, in which the column `prose` may be cut. In a
    pipe it has all columns, and nothing is cut. A long table is printed in parts, so that memory does not
    grow with it.
    """

    def __init__(self, layouts: Sequence[Sequence[str]], prose: str, *, is_json: bool) -> None:
        self.printed = 0
        self._layouts = layouts
        self._prose = prose
        self._is_json = is_json
        self._waiting: list[Cells] = []

    def add(self, rows: Sequence[Document]) -> None:
        """Print rows at once, or as soon as there are enough for a part of the table."""
        if self._is_json:
            _print_json(rows)
            self.printed += len(rows)
            return
        for row in rows:
            self._waiting.append({name: escape(_cell(name, row.get(name))) for name in self._layouts[0]})
            if len(self._waiting) == PAGE_SIZE:
                self.end()

    def end(self) -> None:
        """Print the rows that are left."""
        if not self._waiting:
            return
        is_terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else math.inf
        header, *lines = fit(self._waiting, self._layouts, width, NUMBERS, self._prose)
        # The columns of a part can differ on a terminal.
        if is_terminal or not self.printed:
            echo(header)
        echo(*lines)
        self.printed += len(self._waiting)
        self._waiting.clear()


def _print_json(rows: Sequence[Document]) -> None:
    if rows:
        echo(*(orjson.dumps(row).decode() for row in rows))


def _cell(name: str, value: Any) -> str:
    """Return a value in a table: a time without its fraction, and of related rows what identifies them."""
    if name.endswith("_at") and value:
        return f"{value[:10]} {value[11:19]}"
    if isinstance(value, list):
        return f"{len(value)}+" if len(value) == MOST_POSTS else str(len(value))
    if isinstance(value, dict):
        return str(value["email"])
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"{value['email']} ({value['full_name']})" if value["full_name"] else str(value["email"])
    return str(value)
