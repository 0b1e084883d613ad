"""What a bulk stream tells the metrics."""

from time import perf_counter

from service.bulk.operation import Operation
from service.bulk.pending import Slot
from service.db.bulk.batch import Outcome
from service.errors import RosterError
from service.loads.repository import COUNTED
from service.metrics import BULK_BATCH, BULK_BATCH_ROWS, BULK_LAG, BULK_REFUSED, BULK_ROWS


class Measured:
    """The metrics of one stream."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation.method.rpartition(".")[2]
        self._uncommitted = 0

    def received(self, slot: Slot) -> None:
        """Count the rows of a message that is in hand from now on."""
        self._lag(slot.size)

    def recorded(self, slot: Slot, new: Outcome) -> None:
        """Count a message that was acknowledged, and what became of its new rows."""
        self._lag(-slot.size)
        BULK_BATCH_ROWS.labels(self._operation).observe(slot.size)
        BULK_BATCH.labels(self._operation).observe(perf_counter() - slot.received_at)
        counts = {name: getattr(new, name) for name in COUNTED} | {"replayed": slot.replayed}
        for outcome, rows in counts.items():
            BULK_ROWS.labels(self._operation, outcome).inc(rows)

    def refused(self, slot: Slot, error: RosterError) -> None:
        """Count a message of which nothing was recorded."""
        self._lag(-slot.size)
        BULK_REFUSED.labels(self._operation, error.reason).inc()

    def closed(self) -> None:
        """Forget what was in hand when the stream ended."""
        self._lag(-self._uncommitted)

    def _lag(self, rows: int) -> None:
        self._uncommitted += rows
        BULK_LAG.inc(rows)
