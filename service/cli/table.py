"""Tables that fit the terminal: narrow ones have fewer columns, and every row is one line."""

from collections.abc import Mapping, Sequence

GAP = "  "
CUT = "…"

Cells = Mapping[str, str]  # by column


def fit(
    rows: Sequence[Cells], layouts: Sequence[Sequence[str]], width: int, right: frozenset[str] = frozenset()
) -> list[str]:
    """Return the lines of a table, its header first, with the first layout that is narrow enough.

    If none is, the last column of the last layout is cut. Columns in `right` are aligned to the right.
    """
    for layout in layouts:
        widths = [max(len(row[column]) for row in [_header(layout), *rows]) for column in layout]
        if sum(widths) + len(GAP) * (len(widths) - 1) <= width:
            break
    return [_line(row, layout, widths, right, width) for row in [_header(layout), *rows]]


def _header(layout: Sequence[str]) -> Cells:
    return dict(zip(layout, layout, strict=True))


def _line(row: Cells, layout: Sequence[str], widths: Sequence[int], right: frozenset[str], width: int) -> str:
    cells: list[str] = []
    for column, size in zip(layout, widths, strict=True):
        text = row[column]
        cells.append(text.rjust(size) if column in right else text.ljust(size))
    line = GAP.join(cells).rstrip()
    return line if len(line) <= width else line[: width - len(CUT)] + CUT
