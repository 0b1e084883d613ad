"""Matches the acks of a load to the rows of its file."""

from collections import deque
from typing import Any

from roster.v1.bulk_pb2 import BulkAck, RowFailure
from service.cli.rejects import RejectsFile
from service.cli.report import LoadReport
from service.cli.rows import Row

BATCH_FAILURE = RowFailure(reason="BATCH_FAILED", message="another row of its batch failed")


class RowTracker:
    """Remembers rows until their acks arrive, and writes those that failed to the rejects, in file order."""

    def __init__(self, report: LoadReport, rejects: RejectsFile) -> None:
        self._report = report
        self._rejects = rejects
        self._waiting: deque[Row[Any]] = deque()

    def add(self, row: Row[Any]) -> None:
        """Add the next row of the file, before it is sent."""
        self._report.has_sent = True
        self._waiting.append(row)

    def settle(self, ack: BulkAck) -> None:
        """Settle the rows of an ack; raises OSError."""
        failures = {failure.offset: failure for failure in ack.failures}
        for index in range(self._report.add_ack(ack)):
            row = self._waiting.popleft()
            failure = failures.get(ack.offset + index)
            # If a batch fails as a whole, its ack lists only the rows that caused it; the others have no id.
            if failure is None and ack.failed and ack.ids and not ack.ids[index]:
                failure = BATCH_FAILURE
            if failure:
                self.reject(row, failure)

    def reject(self, row: Row[Any], failure: RowFailure) -> None:
        """Report a failed row, and write it to the rejects; raises OSError.

        If the row could not be parsed, that is the reason, and not what the server says of the empty row that
        was sent instead.
        """
        failure = row.failure or failure
        self._report.add_failure(row, failure)
        self._rejects.write(row, failure)
