"""Reports the results of `make bench-read`: as tables, as JSON, and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot as plt
from rich import box
from rich.table import Table

COLUMNS = ("per second", "p50 ms", "p99 ms", "µs server", "µs PostgreSQL")
METHODS = ("no-op", "GetUser", "textbook")
IN_FLIGHT = (1, 16, 64)
BARE = "GetUser without interceptors, 64 in flight"


@dataclass(frozen=True)
class ReadRun:
    """One run: calls, or the rows of an export; p50 and p99 in ms, CPU in seconds."""

    count: int
    seconds: float
    p50: float = 0
    p99: float = 0
    server: float = 0
    postgresql: float = 0

    @property
    def rate(self) -> float:
        """Calls or rows per second."""
        return self.count / self.seconds

    @property
    def cpu(self) -> float:
        """The server's CPU per call, in seconds."""
        return self.server / self.count


Measured = Mapping[str, Sequence[ReadRun]]

# title -> (workload, reference, value, factor); the factor is 100 if a call returns a hundred users.
RATIOS = {
    "GetUser / no-op, 64 in flight": ("GetUser, 64 in flight", "no-op, 64 in flight", "rate", 1),
    "GetUser / textbook, 64 in flight": ("GetUser, 64 in flight", "textbook, 64 in flight", "rate", 1),
    "p99 of GetUser / no-op, 16 in flight": ("GetUser, 16 in flight", "no-op, 16 in flight", "p99", 1),
    "CPU of GetUser, without interceptors / with": (BARE, "GetUser, 64 in flight", "cpu", 1),
    "users per second, BatchGetUsers / GetUser": (
        "BatchGetUsers of 100",
        "GetUser, 64 in flight",
        "rate",
        100,
    ),
    "p50 of ListUsers, depth 400k / 0": (
        "ListUsers of 100 at depth 400k",
        "ListUsers of 100 at depth 0",
        "p50",
        1,
    ),
    r"rows per second, ExportUsers / \copy": ("ExportUsers", r"psql \copy to", "rate", 1),
}


def ratios(seen: Measured) -> dict[str, float]:
    """Return, for each measured pair, the median of the ratios of each round."""
    return {
        title: median(
            times * getattr(run, value) / getattr(other, value)
            for run, other in zip(seen[name], seen[reference], strict=True)
        )
        for title, (name, reference, value, times) in RATIOS.items()
        if name in seen and reference in seen
    }


def as_tables(databases: Mapping[str, Measured]) -> list[Table]:
    """Return Markdown tables: the ratios, then the medians of each database; CPU is per call."""
    compared = {name: ratios(seen) for name, seen in databases.items()}
    tables = [_table("", *compared)]
    for title in dict.fromkeys(title for each in compared.values() for title in each):
        tables[0].add_row(
            title, *(f"{each[title]:.2f}" if title in each else "" for each in compared.values())
        )
    for name, seen in databases.items():
        tables.append(_table(name, *COLUMNS))
        for title, runs in seen.items():
            tables[-1].add_row(title, *_numbers(runs))
    return tables


def as_json(databases: Mapping[str, Measured]) -> dict[str, Any]:
    """Return every run."""
    return {
        name: {
            "ratios": ratios(seen),
            "runs": {title: [asdict(run) for run in runs] for title, runs in seen.items()},
        }
        for name, seen in databases.items()
    }


def draw(databases: Mapping[str, Measured], file: Path) -> None:
    """Draw the calls per second, by calls in flight, into an SVG file."""
    plt.rcParams["svg.hashsalt"] = "roster"  # makes the file reproducible
    figure, axes = plt.subplots(1, len(databases), figsize=(9, 3.5), sharey=True, squeeze=False)
    for axis, (name, seen) in zip(axes[0], databases.items(), strict=True):
        for position, method in enumerate(METHODS):
            rates = [
                median(run.rate for run in seen[f"{method}, {number} in flight"]) for number in IN_FLIGHT
            ]
            places = [place + (position - 1) / 4 for place in range(len(IN_FLIGHT))]
            axis.bar(places, rates, width=0.23, label=method)
        axis.set_xticks(range(len(IN_FLIGHT)), map(str, IN_FLIGHT))
        axis.set_xlabel("calls in flight")
        axis.set_title(name)
    axes[0][0].set_ylabel("calls per second, one process")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def _table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _numbers(runs: Sequence[ReadRun]) -> list[str]:
    shown = [f"{median(run.rate for run in runs):,.0f}"]
    for value in ("p50", "p99"):
        number = median(getattr(run, value) for run in runs)
        shown.append(f"{number:.1f}" if number else "")
    for value in ("server", "postgresql"):
        cpu = median(getattr(run, value) / run.count for run in runs) * 1e6
        shown.append(f"{cpu:,.0f}" if cpu >= 10 else f"{cpu:.1f}" if cpu else "")  # noqa: PLR2004
    return shown
