"""Row sources: a file or standard input, plain or compressed."""

import asyncio
import os
import re
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
    b"ARROW1": "the file is Arrow or Feather; write it as Parquet, or export it as CSV",
    b"PARE": "the file is encrypted Parquet; write it without encryption",
    b"version https://git-lfs": "the file is a pointer of Git LFS; download its content with `git lfs pull`",
}
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257  # of POSIX, and of GNU tar
MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|\?xml|html|head|body|error)\b", re.IGNORECASE)
PEEKED = TAR_MAGIC_OFFSET + len(TAR_MAGIC)
CHUNK_ROWS = 1000
ROWS_PER_TELL = 100  # between two system calls for the progress
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
        self._status = status if status and stat.S_ISREG(status.st_mode) else None
        self.bytes_total = self._status.st_size if self._status else 0
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
            if self._status is None and not file.peek(1):
                raise SourceError("the input is empty; check the command that writes to it")
            try:
                _refuse_other_contents(file)
                content = decompress(file)
                if content is not file:
                    _refuse_other_contents(content, is_decompressed=True)
                for number, row in enumerate(self.format.rows(content)):
                    if self.bytes_total and number % ROWS_PER_TELL == 0:
                        self.bytes_read = file.raw.tell()
                    yield row
                self.bytes_read = self.bytes_total
            except DAMAGED as error:
                raise SourceError(f"the compressed data is damaged: {error}") from None
            self._check_unchanged(os.fstat(file.fileno()))

    def _check_unchanged(self, status: os.stat_result) -> None:
        """Raise SourceError if the file is not the one from which the id of the load was derived."""
        if self._status and _version(status) != _version(self._status):
            raise SourceError("the file has changed while it was read; load it again when it is complete")


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_other_contents(file: BufferedReader, *, is_decompressed: bool = False) -> None:
    start = file.peek(PEEKED)
    for signature, advice in OTHER_CONTENTS.items():
        if start.startswith(signature):
            raise SourceError(advice)
    if start[TAR_MAGIC_OFFSET:].startswith(TAR_MAGIC):
        raise SourceError("the file is a tar archive; unpack it, and load the files inside")
    if MARKUP.match(start):
        raise SourceError("the file is HTML or XML, such as the error page of a server; download it again")
    if is_decompressed and decompress(file) is not file:
        raise SourceError("the file is compressed twice; decompress it once: zcat FILE")


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
