"""Reports the results of `make bench-bulk`: medians, and the ratios of each round, as a table or as JSON."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from bench.cases import Case
from bench.measure import Approach, Run

PARTS = ("postgresql", "server", "client")
COLUMNS = ("ratio", "rows/s", "µs PostgreSQL", "µs server", "µs client")


@dataclass(frozen=True)
class Result:
    """The rounds of a case; `runs[i]` and `references[i]` belong to the same round."""

    case: Case
    runs: list[Run]
    references: list[Run]

    @property
    def ratios(self) -> list[float]:
        """The rate of the approach in each round, relative to the reference."""
        return [run.rate / other.rate for run, other in zip(self.runs, self.references, strict=True)]


def machine(postgresql: str) -> str:
    """Return a description of the machine and the versions."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()}; PostgreSQL {postgresql}; Python {platform.python_version()}"


def as_table(results: Sequence[Result]) -> Table:
    """Return a Markdown table; CPU is in microseconds per row."""
    table = Table(box=box.MARKDOWN)
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(result.case.title, f"{median(result.ratios):.2f}", *_numbers(result.runs))
        table.add_row(f"… {result.case.reference.name}", "1.00", *_numbers(result.references))
    return table


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return every run."""
    return [
        {
            "case": result.case.name,
            "ratio": median(result.ratios),
            "ratios": result.ratios,
            "runs": _runs(result.case.approach, result.runs),
            "reference": _runs(result.case.reference, result.references),
        }
        for result in results
    ]


def _numbers(runs: Sequence[Run]) -> list[str]:
    rate = median(run.rate for run in runs)
    cpu = [median(run.cpu(part) for run in runs) for part in PARTS]
    return [f"{rate:,.0f}", *(f"{each:.1f}" for each in cpu)]


def _runs(approach: Approach, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "name": approach.name,
        "rows_per_second": median(run.rate for run in runs),
        "runs": list(map(asdict, runs)),
    }
