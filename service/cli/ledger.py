"""What becomes of the rows of a load: counts, and a file of those that failed."""

import io
from collections import Counter, deque
from pathlib import Path

from roster.v1.bulk_pb2 import BulkAck, RowFailure
from service.cli.rows import FileFormat, Row

MAX_HELD_BYTES = 8 << 20
BATCH_FAILURE = RowFailure(reason="BATCH_FAILED", message="another row of its batch failed")


class Rejects:
    """The file of the rows that failed, each with why; it is made, or replaced, when the first one comes."""

    def __init__(self, path: Path, file_format: FileFormat) -> None:
        self.path = path
        self._format = file_format
        self._file: io.BufferedWriter | None = None

    def __bool__(self) -> bool:
        return self._file is not None

    def add(self, row: Row, failure: RowFailure) -> None:
        """Write a row; raises OSError."""
        if self._file is None:
            self._file = self.path.open("wb")
            self._file.write(self._format.head())
        self._file.write(self._format.rejected(row, failure))

    def close(self) -> None:
        """Write what is buffered."""
        if self._file:
            self._file.close()


class Ledger:
    """The counts, and the rows that the server has not answered for, so that rejects keep the file's order.

    Rows that could not be read wait among them, 8 MiB at most; more are rejected before their turn.
    """

    def __init__(self, rejects: Rejects) -> None:
        self.counts = dict.fromkeys(("created", "updated", "skipped", "failed"), 0)
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.sentences: dict[tuple[str, str], str] = {}
        self._rejects = rejects
        self._waiting: deque[Row] = deque()
        self._held_bytes = 0
        self._offset = 0  # of the first waiting row that has a message

    @property
    def rows(self) -> int:
        """How many rows are settled."""
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return self.counts["failed"]

    def note(self, row: Row) -> None:
        """Take in a row, in the order of the file and before it is sent."""
        self._waiting.append(row)
        if row.failure:
            self.counts["failed"] += 1
            self._held_bytes += row.size
        if self._held_bytes > MAX_HELD_BYTES:
            self._release_held()
        self._release_foremost()

    def settle(self, ack: BulkAck) -> None:
        """Take in what became of the rows of an ack."""
        for name in self.counts:
            self.counts[name] += getattr(ack, name)
        failures = {failure.offset: failure for failure in ack.failures}
        # Where one row failed the whole batch, the ack has no failures of the others.
        default = BATCH_FAILURE if ack.failed == ack.next_offset - ack.offset else None
        while self._offset < ack.next_offset:
            row = self._waiting.popleft()
            if failure := failures.get(self._offset, default):
                self._reject(row, failure)
            self._offset += 1
            self._release_foremost()

    def _release_foremost(self) -> None:
        while self._waiting and (failure := self._waiting[0].failure):
            row = self._waiting.popleft()
            self._held_bytes -= row.size
            self._reject(row, failure)

    def _release_held(self) -> None:
        for row in self._waiting:
            if row.failure:
                self._reject(row, row.failure)
        self._waiting = deque(row for row in self._waiting if not row.failure)
        self._held_bytes = 0

    def _reject(self, row: Row, failure: RowFailure) -> None:
        key = failure.reason, failure.field
        self.reasons[key] += 1
        self.sentences.setdefault(key, failure.message)
        self._rejects.add(row, failure)
