"""A mirror inside the process of a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from service.cli.columns import Columns
from service.cli.formats import Csv, Json
from service.cli.mirror.difference import Difference
from service.cli.mirror.mirror import Mirror
from service.cli.mirror.options import DeleteLimitType, MirrorOptions
from service.cli.mirror.report import MirrorReport
from service.cli.rejects import RejectsFile
from service.cli.rows import USERS
from service.cli.source import Source
from service.cli.terminal import Target


class MirrorRun:
    """A run inside the process, which can be stopped between its plan and its writes."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder
        self._target = Target(address, None, None, None, None, None, None, insecure_token=False)
        self._mirror: Mirror | None = None
        self.rejects = folder / "rejects.ndjson"

    @asynccontextmanager
    async def planned(self, text: str, **options: Any) -> AsyncIterator[MirrorReport]:
        """Yield a run that has made its plan; at the end of the block it writes."""
        path = self._folder / "users.csv"
        path.write_text(text)
        key = options.get("key", "email")
        columns = Columns(USERS, ("id", *USERS.loaded) if key == "id" else USERS.loaded)
        values = MirrorOptions(
            key,
            options.get("filter", ""),
            DeleteLimitType().convert(options.get("limit", "100%"), None, None),
            options.get("batch_rows", 1000),
            deactivates=bool(options.get("deactivates")),
            is_dry_run=False,
        )
        rejects = RejectsFile(self.rejects, Json(columns))
        report = MirrorReport(
            "users.csv",
            rejects,
            has_filter=bool(values.filter),
            deactivates=values.deactivates,
            is_dry_run=False,
        )
        with closing(Difference(key)) as difference, closing(rejects):
            mirror = self._mirror = Mirror(
                Source(str(path), Csv(columns)), difference, values, report, rejects
            )
            await mirror.plan(self._target)
            yield report
            await mirror.write(self._target)

    def keep_steps(self, *outcomes: str) -> None:
        """Let the run that is planned end after these steps."""
        assert self._mirror
        self._mirror._steps = [step for step in self._mirror._steps if step.outcome in outcomes]

    async def run(self, text: str, **options: Any) -> MirrorReport:
        """Run to the end."""
        async with self.planned(text, **options) as report:
            return report
