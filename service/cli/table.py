"""Tables that fit the terminal: narrow ones have fewer columns, or give the last column its own line."""

import unicodedata
from collections.abc import Mapping, Sequence

GAP = "  "
MIN_CUT, CUT = 16, "…"  # the least that is left of a text, and what stands at its end

Cells = Mapping[str, str]  # by column


def fit(
    rows: Sequence[Cells],
    layouts: Sequence[Sequence[str]],
    width: float,
    right: frozenset[str] = frozenset(),
    prose: str = "",
) -> list[str]:
    """Return the lines of a table, its header first, with the first layout that is narrow enough.

    If none is, the last column is on a line of its own, below the others: an id is not cut, so that it can
    be copied. Only the column `prose` may be cut, to MIN_CUT characters. Columns in `right` are aligned to
    the right. `width` is in columns of the terminal; it may be infinite.
    """
    for layout in layouts:
        shown = _cut_prose(rows, layout, width, prose)
        if _width(shown, layout) <= width:
            return _lines(shown, layout, right)
    *others, last = next((one for one in layouts if _width(rows, one[:-1]) <= width), layouts[-1])
    lines: list[str] = []
    for line, row in zip(_lines(rows, others, right), [_header([last]), *rows], strict=True):
        lines += [line, f"{GAP}{row[last]}"]
    return lines


def _cut_prose(rows: Sequence[Cells], layout: Sequence[str], width: float, prose: str) -> Sequence[Cells]:
    """Return rows whose prose leaves enough room for the other columns, if that is possible."""
    excess = _width(rows, layout) - width
    if prose not in layout or excess <= 0:
        return rows
    longest = max(_size(row[prose]) for row in rows)
    size = max(int(longest - excess), MIN_CUT)
    return [{**row, prose: cut(row[prose], size)} for row in rows]


def cut(text: str, size: int) -> str:
    """Return a text, cut to a width in columns of the terminal."""
    if _size(text) <= size:
        return text
    while _size(text) >= size:
        text = text[:-1]
    return text + CUT


def _size(text: str) -> int:
    """Return the width of a text on a terminal, where letters of East Asia take two columns."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    marks = sum(unicodedata.combining(letter) > 0 for letter in text)
    return len(text) + wide - marks


def _header(layout: Sequence[str]) -> Cells:
    return dict(zip(layout, layout, strict=True))


def _widths(rows: Sequence[Cells], layout: Sequence[str]) -> list[int]:
    return [max(_size(row[column]) for row in [_header(layout), *rows]) for column in layout]


def _width(rows: Sequence[Cells], layout: Sequence[str]) -> int:
    return sum(_widths(rows, layout)) + len(GAP) * (len(layout) - 1)


def _lines(rows: Sequence[Cells], layout: Sequence[str], right: frozenset[str]) -> list[str]:
    """Return the header and the rows, each as a line with these columns."""
    widths = _widths(rows, layout)
    lines: list[str] = []
    for row in [_header(layout), *rows]:
        cells: list[str] = []
        for column, size in zip(layout, widths, strict=True):
            text, padding = row[column], " " * (size - _size(row[column]))
            cells.append(padding + text if column in right else text + padding)
        lines.append(GAP.join(cells).rstrip())
    return lines
