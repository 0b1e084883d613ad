"""The file of rejects: the rows of a load that failed, with the reasons."""

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from roster.v1.bulk_pb2 import RowFailure
from service.cli.formats import FileFormat
from service.cli.rows import Row
from service.files import create, is_written_in_place

COMPARED_BYTES = 1 << 20  # at once


class RejectsFile:
    """A file of rejects, created when the first row is written; never overwrites other content.

    Users edit rejects and load them again, so a file that exists is kept, and the new rejects go to `.2`,
    `.3` and so on. The exception is a file whose content the new one repeats from the start, such as that of
    an earlier run of the same load: `close` replaces it.
    """

    def __init__(self, path: Path, file_format: FileFormat) -> None:
        self.path = path
        self.written_to: Path | None = None
        self._format = file_format
        self._file: IO[bytes] | None = None

    def write(self, row: Row[Any], failure: RowFailure) -> None:
        """Append a row; raises OSError."""
        if self._file is None:
            self._file = self._create()
            self._file.write(self._format.rejects_header())
        self._file.write(self._format.reject(row, failure))

    def close(self) -> None:
        """Flush the file, and replace an earlier one that it contains."""
        if self._file is None or self.written_to is None:
            return
        self._file.close()
        for earlier in self._candidates():
            if earlier == self.written_to:
                return
            if earlier.is_file() and _starts_with(self.written_to, earlier):
                self.written_to = self.written_to.replace(earlier)
                return

    def _create(self) -> IO[bytes]:
        for path in self._candidates():
            self.written_to = path
            if is_written_in_place(path):
                return path.open("wb")
            try:
                return create(path)
            except FileExistsError:
                continue
        raise AssertionError("the candidates never end")

    def _candidates(self) -> Iterator[Path]:
        yield self.path
        for number in count(2):
            yield self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")


def _starts_with(path: Path, earlier: Path) -> bool:
    with path.open("rb") as longer, earlier.open("rb") as shorter:
        parts = iter(partial(shorter.read, COMPARED_BYTES), b"")
        return all(longer.read(len(part)) == part for part in parts)
