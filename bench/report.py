"""Tables of what was measured: as Markdown, and as JSON from which the plots are drawn."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from bench.measure import Run, Runs

PARTS = {"server": "µs server", "postgresql": "µs PostgreSQL", "client": "µs client"}
# Of each value that a table compares: its heading, and how it is written.
VALUES = {"rate": "{unit}/s", "p50": "p50, ms", "seconds": "s", "mib": "MiB"}
Value = Literal["rate", "p50", "seconds", "mib"]


@dataclass(frozen=True)
class Table:
    """Runs by the name of what ran; `value` is compared with that of the reference in the same round.

    `references` names the references of rows that have another one.
    """

    name: str
    title: str
    unit: str
    reference: str
    runs: Runs
    value: Value = "rate"
    references: Mapping[str, str] = field(default_factory=dict)

    def values(self, row: str) -> list[float]:
        """Return the value of each round, in the unit of its heading."""
        factor = 1000 if self.value == "p50" else 1
        return [factor * getattr(run, self.value) for run in self.runs[row]]

    def ratios(self, row: str) -> list[float]:
        """Return the value of each round as a multiple of the reference's; empty without a reference."""
        reference = self.references.get(row, self.reference)
        if reference not in self.runs:
            return []
        return [mine / other for mine, other in zip(self.values(row), self.values(reference), strict=True)]


def machine(postgresql: str) -> str:
    """Return a description of the machine and the versions."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()}; PostgreSQL {postgresql}; Python {platform.python_version()}"


def heading(table: Table) -> str:
    """Return what the values of a table are."""
    return VALUES[table.value].format(unit=table.unit)


def as_markdown(table: Table) -> str:
    """Return a table of medians, with the least and greatest value of all rounds; CPU is per call or row."""
    runs_of_all = [run for runs in table.runs.values() for run in runs]
    parts = [part for part in PARTS if any(getattr(run, part) for run in runs_of_all)]
    has_p99 = table.value == "p50"
    headings = [heading(table), "min to max", "ratio", "min to max", *(["p99, ms"] if has_p99 else [])]
    lines = [["", *headings, *(PARTS[part] for part in parts)]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for row, runs in table.runs.items():
        cells = [row, *_cells(table.values(row)), *_cells(table.ratios(row))]
        cells += [three_digits(1000 * median(run.p99 for run in runs))] if has_p99 else []
        lines.append([*cells, *(_cpu(runs, part) for part in parts)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def save(table: Table, described: str, file: Path) -> None:
    """Add every run of a table to a JSON file; an earlier table of this name is replaced."""
    tables = json.loads(file.read_text()) if file.exists() else {}
    tables[table.name] = {"machine": described, **asdict(table)}
    file.write_text(json.dumps(tables, indent=1) + "\n")


def load(file: Path) -> list[Table]:
    """Return the tables in a JSON file."""
    return [_table(**saved) for saved in json.loads(file.read_text()).values()]


def _table(*, machine: str, runs: Mapping[str, Any], **rest: Any) -> Table:  # noqa: ARG001
    return Table(runs={row: [Run(**run) for run in each] for row, each in runs.items()}, **rest)


def _cells(values: list[float]) -> list[str]:
    if not values:
        return ["", ""]
    return [three_digits(median(values)), f"{three_digits(min(values))} to {three_digits(max(values))}"]


def _cpu(runs: list[Run], part: str) -> str:
    cpu = median(run.cpu(part) for run in runs)
    return three_digits(cpu) if cpu else ""


def three_digits(value: float) -> str:
    """Return a number with three significant digits."""
    digits = next((digits for digits, least in enumerate((100, 10)) if value >= least), 2)
    return f"{value:,.{digits}f}"
