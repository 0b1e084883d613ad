"""The plan of a mirror, and its report, for people and for programs."""

import time
from collections import Counter
from typing import Any

from roster.v1.bulk_pb2 import BulkAck, RowFailure
from service.cli.mirror.difference import Counts
from service.cli.rejects import RejectsFile
from service.cli.terminal import pluralize

TOP_REASONS = 5
OUTCOMES = ("deleted", "deactivated", "updated", "created", "skipped", "failed")


class MirrorReport:
    """The plan, and the outcomes of its rows so far."""

    def __init__(
        self, name: str, rejects: RejectsFile, *, has_filter: bool, deactivates: bool, is_dry_run: bool
    ) -> None:
        self.name = name
        self.rows = 0  # read
        self.users = 0  # exported
        self.counts = Counts(rows=0, matching=0, removable=0, deletes=0, updates=0, creates=0)
        self.planned_posts = 0
        self.removed: list[str] = []  # the first users that are not in the file
        self.deleted_posts = 0
        self.outcomes: Counter[str] = Counter()
        self.has_sent = False  # rows that are to be written
        self._has_filter = has_filter
        self._deactivates = deactivates
        self._is_dry_run = is_dry_run
        self._rejects = rejects
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # the first failure of each reason
        self._started = time.monotonic()

    def add_ack(self, outcome: str, ack: BulkAck) -> None:
        """Count the rows of an ack; `outcome` is that of those that were written."""
        self.outcomes[outcome] += ack.created + ack.updated + ack.deleted
        self.outcomes["skipped"] += ack.skipped
        self.outcomes["failed"] += ack.failed
        self.deleted_posts += ack.deleted_posts

    def add_failure(self, failure: RowFailure, place: str) -> None:
        """Count the reason of a row that failed."""
        reason = f"{failure.reason} {failure.field}".rstrip()
        self._reasons[reason] += 1
        self._examples.setdefault(reason, f"{place}: {failure.message}")

    def progress(self) -> str:
        """Return the text of the progress bar."""
        if self.has_sent:
            return self._outcomes()
        return f"{self.rows:,} rows read, {pluralize(self.users, 'user')} exported"

    def unfinished(self) -> str:
        """Return the progress of a run that did not finish, and what to do."""
        if not self.has_sent:
            return "nothing was written"
        return f"{self._outcomes()}; run the same command again to make a new plan from there"

    def plan(self) -> str:
        """Return the plan for people."""
        counts = self.counts
        remove = "deactivate" if self._deactivates else "delete"
        posts = f" with {pluralize(self.planned_posts, 'post')}" if self.planned_posts else ""
        users = pluralize(counts.matching, "matching user")
        if not self._has_filter:
            users = f"{pluralize(counts.matching, 'user')} in all"
        return (
            f"{self.name}: {pluralize(counts.rows, 'row')}, {users}: "
            f"{counts.deletes:,} to {remove}{posts}, {counts.updates:,} to update, "
            f"{counts.creates:,} to create, {counts.unchanged:,} unchanged"
        )

    def lines(self) -> list[str]:
        """Return the summary for people."""
        if self._is_dry_run:
            verb = "deactivate" if self._deactivates else "delete"
            shown = [f"  to {verb}: {user}" for user in self.removed]
            return [*shown, "dry run: nothing was written"]
        lines = [f"{self.name}: done in {self._seconds:.1f} s: {self._outcomes()}"]
        for reason, count in self._reasons.most_common(TOP_REASONS):
            lines.append(f"  {count:,} x {reason}, first at {self._examples[reason]}")
        if self._rejects.written_to:
            lines.append(f"  the failed rows are in {self._rejects.written_to}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the summary for programs."""
        return {
            "file": self.name,
            "rows": self.counts.rows,
            "matching": self.counts.matching,
            "planned": {
                "deletes": self.counts.deletes,
                "deleted_posts": self.planned_posts,
                "updates": self.counts.updates,
                "creates": self.counts.creates,
            },
            "dry_run": self._is_dry_run,
            **{outcome: self.outcomes[outcome] for outcome in OUTCOMES},
            "deleted_posts": self.deleted_posts,
            "unchanged": self.counts.unchanged,
            "seconds": round(self._seconds, 3),
            "reasons": self._reasons,
            "rejects": str(self._rejects.written_to) if self._rejects.written_to else None,
        }

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _outcomes(self) -> str:
        removed = "deactivated" if self._deactivates else "deleted"
        posts = f" with {pluralize(self.deleted_posts, 'post')}" if self.deleted_posts else ""
        gone = f"{self.outcomes['skipped']:,} already gone, " if self.outcomes["skipped"] else ""
        return (
            f"{self.outcomes[removed]:,} {removed}{posts}, {self.outcomes['updated']:,} updated, "
            f"{self.outcomes['created']:,} created, {gone}{self.outcomes['failed']:,} failed"
        )
