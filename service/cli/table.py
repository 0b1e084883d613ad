"""Tables that fit the terminal: narrow ones have fewer columns, or give the last column its own line."""

from collections.abc import Mapping, Sequence

GAP = "  "

Cells = Mapping[str, str]  # by column


def fit(
    rows: Sequence[Cells], layouts: Sequence[Sequence[str]], width: int, right: frozenset[str] = frozenset()
) -> list[str]:
    """Return the lines of a table, its header first, with the first layout that is narrow enough.

    If none is, the last column is on a line of its own, below the others: nothing is cut, so that an id can
    be copied. Columns in `right` are aligned to the right.
    """
    for layout in layouts:
        if _width(rows, layout) <= width:
            return _lines(rows, layout, right)
    *others, last = next((one for one in layouts if _width(rows, one[:-1]) <= width), layouts[-1])
    lines: list[str] = []
    for line, row in zip(_lines(rows, others, right), [_header([last]), *rows], strict=True):
        lines += [line, f"{GAP}{row[last]}"]
    return lines


def _header(layout: Sequence[str]) -> Cells:
    return dict(zip(layout, layout, strict=True))


def _widths(rows: Sequence[Cells], layout: Sequence[str]) -> list[int]:
    return [max(len(row[column]) for row in [_header(layout), *rows]) for column in layout]


def _width(rows: Sequence[Cells], layout: Sequence[str]) -> int:
    return sum(_widths(rows, layout)) + len(GAP) * (len(layout) - 1)


def _lines(rows: Sequence[Cells], layout: Sequence[str], right: frozenset[str]) -> list[str]:
    """Return the header and the rows, each as a line with these columns."""
    widths = _widths(rows, layout)
    lines: list[str] = []
    for row in [_header(layout), *rows]:
        cells: list[str] = []
        for column, size in zip(layout, widths, strict=True):
            text = row[column]
            cells.append(text.rjust(size) if column in right else text.ljust(size))
        lines.append(GAP.join(cells).rstrip())
    return lines
