"""What becomes of the rows of a load: counts, and a file of those that failed."""

from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import IO

from roster.v1.bulk_pb2 import BulkAck, RowFailure
from service.cli.formats import FileFormat
from service.cli.rows import Row
from service.files import create, is_written_in_place

MAX_HELD_BYTES = 8 << 20
COMPARED_BYTES = 1 << 20  # at once
BATCH_FAILURE = RowFailure(reason="BATCH_FAILED", message="another row of its batch failed")


class Ledger:
    """How many rows are settled, why some failed, and their rejects, in the order of the file.

    The file of rejects is made when the first one comes. One that is there already may be mended by now, so
    only one that has all of it replaces it. Rows that could not be read wait for the server's answers about
    those before them, 8 MiB at most; more are rejected before their turn.
    """

    def __init__(self, path: Path, file_format: FileFormat) -> None:
        self.rejects: str | None = None  # where they are
        self.rows = 0
        self.failed = 0
        self.unread = 0  # of those that failed; the server knows nothing of them
        self.reasons: Counter[str] = Counter()
        self.sentences: dict[str, str] = {}  # the first for each reason
        self.path = path
        self._format = file_format
        self._file: IO[bytes] | None = None
        self._waiting: deque[Row] = deque()
        self._held_bytes = 0

    def note(self, row: Row) -> None:
        """Take in a row, in the order of the file and before it is sent."""
        self._waiting.append(row)
        if row.failure:
            self.rows += 1
            self.failed += 1
            self.unread += 1
            self._held_bytes += row.size
        if self._held_bytes > MAX_HELD_BYTES:
            self._release_held()
        self._release_foremost()

    def settle(self, ack: BulkAck) -> None:
        """Take in what became of the rows of an ack."""
        size = ack.created + ack.updated + ack.skipped + ack.failed
        self.rows += size
        self.failed += ack.failed
        failures = {failure.offset: failure for failure in ack.failures}
        for index in range(size):
            row = self._waiting.popleft()
            # Where one row fails its whole batch, the others have no failure, but no id either.
            is_failed = ack.failed and ack.ids and not ack.ids[index]
            if failure := failures.get(ack.offset + index, BATCH_FAILURE if is_failed else None):
                self.reject(row, failure)
            self._release_foremost()

    def reject(self, row: Row, failure: RowFailure) -> None:
        """Write a row to the rejects; raises OSError."""
        reason = f"{failure.reason} {failure.field}".rstrip()
        self.reasons[reason] += 1
        self.sentences.setdefault(reason, f"{self._format.unit} {row.number:,}: {failure.message}")
        if self._file is None:
            self._file = next(filter(None, map(_open_new, self._names())))
            self.rejects = self._file.name
            self._file.write(self._format.head())
        self._file.write(self._format.rejected(row, failure))

    def close(self) -> None:
        """Write what is buffered, and take the place of an earlier file that has no more than this one."""
        if self._file:
            self._file.close()
            written = Path(self._file.name)
            earlier = filter(Path.is_file, takewhile(lambda path: path != written, self._names()))
            if place := next(filter(partial(_begins_with, written), earlier), None):
                self.rejects = str(written.replace(place))

    def _names(self) -> Iterator[Path]:
        yield self.path
        for number in count(2):
            yield self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")

    def _release_foremost(self) -> None:
        while self._waiting and (failure := self._waiting[0].failure):
            row = self._waiting.popleft()
            self._held_bytes -= row.size
            self.reject(row, failure)

    def _release_held(self) -> None:
        for row in self._waiting:
            if row.failure:
                self.reject(row, row.failure)
        self._waiting = deque(row for row in self._waiting if not row.failure)
        self._held_bytes = 0


def _open_new(path: Path) -> IO[bytes] | None:
    if is_written_in_place(path):
        return path.open("wb")
    try:
        return create(path)
    except FileExistsError:
        return None


def _begins_with(path: Path, earlier: Path) -> bool:
    with path.open("rb") as longer, earlier.open("rb") as shorter:
        parts = iter(partial(shorter.read, COMPARED_BYTES), b"")
        return all(longer.read(len(part)) == part for part in parts)
