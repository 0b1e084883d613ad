"""Draws each table into an SVG file that can be read on a light and on a dark page."""

from pathlib import Path
from statistics import median

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from bench.report import Table, heading

INK = "#808080"  # of text and axes: legible on white and on black
ROSTER, OTHER, REFERENCE = "#3b82f6", "#94a3b8", "#d97706"
STYLE = {
    "svg.hashsalt": "roster",  # makes the files reproducible
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
}
WIDTH, HEIGHT_OF_BAR, HEIGHT_OF_AXIS = 7.5, 0.3, 0.8  # inches


def draw(table: Table, folder: Path) -> Path:
    """Draw the medians as bars, with a line from the least to the greatest round; return the file."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, HEIGHT_OF_AXIS + HEIGHT_OF_BAR * len(table.runs)))
        _draw_bars(table, axis)
        figure.tight_layout()
        path = folder / f"bench-{table.name}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)
    return path


def _draw_bars(table: Table, axis: Axes) -> None:
    compared = [row for row in table.runs if not table.references or table.references[row] != row]
    for place, row in enumerate(compared):
        values = table.ratios(row) if table.references else table.values(row)
        middle = median(values)
        spread = [[middle - min(values)], [max(values) - middle]]
        axis.barh(place, middle, xerr=spread, color=_color(table, row), ecolor=INK, height=0.7)
    axis.set_yticks(range(len(compared)), compared)
    axis.invert_yaxis()
    axis.set_xlabel(
        "multiple of the reference's rate" if table.references else f"{table.title}: {heading(table)}"
    )
    if table.references:
        axis.axvline(1, color=REFERENCE)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _color(table: Table, row: str) -> str:
    if row == table.reference:
        return REFERENCE
    return ROSTER if table.references or row.lower().startswith("roster") else OTHER
