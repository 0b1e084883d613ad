"""The options of all benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How large and how long a benchmark is."""

    rounds: int
    rows: int  # users in the table of reads, and of the largest loads
    seconds: float  # of each run of calls
    exported: int = 200_000
