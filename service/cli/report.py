"""The report of a load: its counts and reasons, for people and for programs."""

import time
from collections import Counter
from shlex import join
from typing import Any

from roster.v1 import bulk_pb2 as pb
from service.cli.formats import FileFormat
from service.cli.rejects import RejectsFile
from service.cli.rows import Row
from service.cli.terminal import pluralize

TOP_REASONS = 5
TAKEN = ("EMAIL_TAKEN", "ID_TAKEN")


class LoadReport:
    """The outcomes of the rows of a load so far."""

    def __init__(
        self,
        name: str,
        file_format: FileFormat,
        options: pb.BulkOptions,
        rejects: RejectsFile,
        *,
        is_delete: bool = False,
    ) -> None:
        self.rows = 0
        self.failed = 0
        self.skipped_rows = 0  # settled by an earlier run, and not sent again
        self.was_finished = False  # when this run started
        self.has_sent = False  # a row that was sent may be committed before its ack arrives
        self.summary = pb.BulkSummary()
        self._name = name
        self._format = file_format
        self._options = options
        self._rejects = rejects
        self._is_delete = is_delete
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # the first failure of each reason
        self._started = time.monotonic()

    def add_ack(self, ack: pb.BulkAck) -> int:
        """Count the rows of an ack, and return how many there are."""
        rows = ack.created + ack.updated + ack.deleted + ack.skipped + ack.failed
        self.rows += rows
        self.failed += ack.failed
        return rows

    def add_failure(self, row: Row[Any], failure: pb.RowFailure) -> None:
        """Count the reason of a failed row."""
        reason = f"{failure.reason} {failure.field}".rstrip()
        self._reasons[reason] += 1
        self._examples.setdefault(reason, f"{self._format.unit} {row.number:,}: {failure.message}")

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 0.001)

    @property
    def rows_per_second(self) -> float:
        return (self.rows - self.skipped_rows) / self.seconds

    def progress(self) -> str:
        """Return the text of the progress bar."""
        return f"{self.rows:,} rows, {self.rows_per_second:,.0f} rows/s, {self.failed:,} failed"

    def unfinished(self, *, can_resume: bool) -> str:
        """Return how far an unfinished load came."""
        if not (self.rows or self.has_sent):
            return "nothing was loaded"
        outcome = "validated" if self._options.validate_only else "committed"
        text = f"{pluralize(self.rows - self.failed, 'row')} {outcome}, {self.failed:,} failed"
        if self._rejects.written_to:
            text += f" (see {self._rejects.written_to})"
        if self._options.load_id and can_resume:
            text += f"; run the same command to resume load {self._options.load_id}"
        elif self._options.load_id:
            text += f"; `{self._show_command()}` describes the load"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return the summary for programs."""
        return {
            "file": self._name,
            "load_id": self._options.load_id or None,
            "was_finished": self.was_finished,
            "rows": self.rows,
            "created": self.summary.created,
            "updated": self.summary.updated,
            "deleted": self.summary.deleted,
            "deleted_posts": self.summary.deleted_posts,
            "skipped": self.summary.skipped,
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "reasons": self._reasons,
            "rejects": str(self._rejects.written_to) if self._rejects.written_to else None,
        }

    def lines(self) -> list[str]:
        """Return the summary for people."""
        lines = [f"{self._name}: {self._timing()}: {self._counts()}"]
        for reason, count in self._reasons.most_common(TOP_REASONS):
            lines.append(f"  {count:,} x {reason}, first at {self._examples[reason]}")
        if self._are_most_taken():
            lines.append("  rows that are already in Roster: --on-conflict skip skips them")
        written_to = self._rejects.written_to
        if written_to == self._rejects.path:
            lines.append(f"  the failed rows are in {written_to}")
        elif written_to:
            kept = self._rejects.path
            lines.append(f"  the failed rows are in {written_to}; {kept} has other content and was kept")
        if self.failed and self._options.load_id:
            lines.append(f"  `{self._show_command()}` lists the failures")
        return lines

    def _are_most_taken(self) -> bool:
        """Return whether most failed rows have a key that Roster already has, as in a second load."""
        if self._options.on_conflict != pb.BulkOptions.FAIL or self._options.update_mask.paths:
            return False
        taken = sum(count for reason, count in self._reasons.items() if reason.startswith(TAKEN))
        return 2 * taken > self.failed

    def _show_command(self) -> str:
        """Return the command that shows this load."""
        command = ["roster", "loads", "show", self._options.load_id]
        if self._options.caller:
            command += ["--caller", self._options.caller]
        return join(command)

    def _timing(self) -> str:
        if self.was_finished:
            return "already finished, nothing was sent (use another --load-id to load it again)"
        rows = pluralize(self.rows, "row")
        if self.skipped_rows:
            rows += f", {self.rows - self.skipped_rows:,} of them in this run,"
        return f"{rows} in {self.seconds:.1f} s ({self.rows_per_second:,.0f} rows/s)"

    def _counts(self) -> str:
        summary = self.summary
        if self._is_delete:
            return self._delete_counts()
        rest = f"{summary.updated:,} updated, {summary.skipped:,} skipped, {self.failed:,} failed"
        if self._options.validate_only:
            return f"{summary.created:,} would be created, {rest}; nothing was written"
        return f"{summary.created:,} created, {rest}"

    def _delete_counts(self) -> str:
        summary, is_dry = self.summary, self._options.validate_only
        deleted = f"{summary.deleted:,} would be deleted" if is_dry else f"{summary.deleted:,} deleted"
        if summary.deleted_posts:
            deleted += f" with {pluralize(summary.deleted_posts, 'post')}"
        nothing = "; nothing was written" if is_dry else ""
        return f"{deleted}, {summary.skipped:,} skipped, {self.failed:,} failed{nothing}"
