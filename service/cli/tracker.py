"""Matches the acks of a load to the rows of its file."""

from collections import deque

from roster.v1.bulk_pb2 import BulkAck, RowFailure
from service.cli.rejects import RejectsFile
from service.cli.report import LoadReport
from service.cli.rows import Row

MAX_HELD_BYTES = 8 << 20
BATCH_FAILURE = RowFailure(reason="BATCH_FAILED", message="another row of its batch failed")


class RowTracker:
    """Remembers rows until their acks arrive, and writes those that failed to the rejects, in file order.

    A row that could not be parsed has no ack. It is held until the rows before it are settled, so that the
    rejects keep the order of the file. If more than MAX_HELD_BYTES of such rows are held, they are written
    at once, out of order.
    """

    def __init__(self, report: LoadReport, rejects: RejectsFile) -> None:
        self._report = report
        self._rejects = rejects
        self._waiting: deque[Row] = deque()
        self._held_bytes = 0

    def add(self, row: Row) -> None:
        """Add the next row of the file, before it is sent."""
        self._waiting.append(row)
        if row.failure:
            self._report.add_unparsed()
            self._held_bytes += row.size
        if self._held_bytes > MAX_HELD_BYTES:
            self._reject_all_unparsed()
        self._reject_unparsed_at_front()

    def settle(self, ack: BulkAck) -> None:
        """Settle the rows of an ack."""
        failures = {failure.offset: failure for failure in ack.failures}
        for index in range(self._report.add_ack(ack)):
            row = self._waiting.popleft()
            failure = failures.get(ack.offset + index)
            # If a batch fails as a whole, its ack lists only the rows that caused it; the others have no id.
            if failure is None and ack.failed and ack.ids and not ack.ids[index]:
                failure = BATCH_FAILURE
            if failure:
                self.reject(row, failure)
            self._reject_unparsed_at_front()

    def reject(self, row: Row, failure: RowFailure) -> None:
        """Report a failed row, and write it to the rejects; raises OSError."""
        self._report.add_failure(row, failure)
        self._rejects.write(row, failure)

    def _reject_unparsed_at_front(self) -> None:
        while self._waiting and (failure := self._waiting[0].failure):
            row = self._waiting.popleft()
            self._held_bytes -= row.size
            self.reject(row, failure)

    def _reject_all_unparsed(self) -> None:
        for row in self._waiting:
            if row.failure:
                self.reject(row, row.failure)
        self._waiting = deque(row for row in self._waiting if not row.failure)
        self._held_bytes = 0
