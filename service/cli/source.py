"""Row sources: a file or standard input, plain or compressed."""

import asyncio
import stat
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from hashlib import file_digest
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from service.cli.compression import DAMAGED, decompress
from service.cli.formats import STDIN, FileFormat, SourceError
from service.cli.rows import Row

T = TypeVar("T")
AnyRow: TypeAlias = Row[Any]

OTHER_CONTENTS = {
    b"PK\x03\x04": "the file is a ZIP archive or a workbook; unpack it, or save the sheet as “CSV UTF-8”",
    b"\xd0\xcf\x11\xe0": "the file is a workbook; save the sheet as “CSV UTF-8”, and load that file",
    b"BZh": "the file is compressed with bzip2; use gzip or zstd: bunzip2 -c FILE | gzip > FILE.gz",
    b"\xfd7zXZ\0": "the file is compressed with xz; use gzip or zstd: xz -dc FILE | gzip > FILE.gz",
    b"Obj\x01": "the file is Avro; export it as NDJSON, CSV or Parquet",
    b"ORC": "the file is ORC; export it as NDJSON, CSV or Parquet",
    b"SQLite format 3\0": "the file is a SQLite database; export a table as CSV",
    b"PGDMP": "the file is a dump of pg_dump; export a table as CSV: \\copy TABLE to FILE csv header",
}
CHUNK_ROWS = 1000
CHUNK_BYTES = 1 << 20


class Source:
    """The rows of a file, or of standard input (`-`). They are read and parsed in threads.

    `bytes_read` of `bytes_total` have been read; both are 0 if the size is unknown. Raises OSError.
    """

    def __init__(self, path: str, file_format: FileFormat) -> None:
        self.name = "stdin" if path == STDIN else path
        self._path = path
        self.format = file_format
        status = None if path == STDIN else Path(path).stat()
        self.bytes_total = status.st_size if status and stat.S_ISREG(status.st_mode) else 0
        self.bytes_read = 0
        self._rows = self._read()
        self._prefetched: list[AnyRow] = []

    def digest(self) -> bytes:
        """Return a digest of the content, b"" if the source can be read only once."""
        if not self.bytes_total:
            return b""
        with Path(self._path).open("rb") as file:
            return file_digest(file, "sha256").digest()

    async def prefetch(self) -> None:
        """Read the header and the first rows; raises SourceError, OSError."""
        self._prefetched = await _run_in_daemon_thread(self._read_chunk)

    async def chunks(self, start: int) -> AsyncGenerator[list[AnyRow], None]:
        """Yield the rows, many at a time; raises SourceError, OSError.

        The first `start` rows are not parsed.
        """
        try:
            while chunk := await _run_in_daemon_thread(partial(self._next_chunk, start)):
                start -= len(chunk)
                yield chunk
        finally:
            with suppress(ValueError):  # the thread is blocked in a read, which can't be interrupted
                self._rows.close()

    def _next_chunk(self, start: int) -> list[AnyRow]:
        chunk, self._prefetched = self._prefetched or self._read_chunk(), []
        for row in chunk[max(start, 0) :]:
            row.parse()
        return chunk

    def _read_chunk(self) -> list[AnyRow]:
        """Return the next rows: a thread hop for each row would cost more than parsing it."""
        chunk: list[AnyRow] = []
        size = 0
        for row in self._rows:
            chunk.append(row)
            size += row.size
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
                break
        return chunk

    def _read(self) -> Generator[AnyRow, None, None]:
        is_stdin = self._path == STDIN
        with open(0 if is_stdin else self._path, "rb", closefd=not is_stdin) as file:
            _refuse_other_contents(file)
            try:
                for row in self.format.rows(decompress(file)):
                    if self.bytes_total:
                        self.bytes_read = file.raw.tell()
                    yield row
            except DAMAGED as error:
                raise SourceError(f"the compressed data is damaged: {error}") from None


def _refuse_other_contents(file: BufferedReader) -> None:
    start = file.peek(len(max(OTHER_CONTENTS, key=len)))
    for signature, advice in OTHER_CONTENTS.items():
        if start.startswith(signature):
            raise SourceError(advice)


async def _run_in_daemon_thread(work: Callable[[], T]) -> T:
    """Run work in a thread, like asyncio.to_thread, but one that does not block the exit of the process.

    A read of standard input may never return.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised by the await
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
