"""Where rows come from: a file or standard input, plain or gzip."""

import asyncio
import gzip
import stat
import threading
import zlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import TypeVar

from service.cli.formats import STDIN, FileFormat, SourceError
from service.cli.rows import Row

T = TypeVar("T")

GZIP_MAGIC = b"\x1f\x8b"
CHUNK_ROWS = 1000
CHUNK_BYTES = 1 << 20


class Source:
    """The rows of a file, or of standard input (`-`), read a line at a time by a thread of their own.

    `bytes_read` of `bytes_total` is how far it is; both are 0 where the size is unknown. Raises OSError.
    """

    def __init__(self, path: str, file_format: FileFormat) -> None:
        self.name = "stdin" if path == STDIN else path
        self._path = path
        self.format = file_format
        status = None if path == STDIN else Path(path).stat()
        self.bytes_total = status.st_size if status and stat.S_ISREG(status.st_mode) else 0
        self.bytes_read = 0
        self._rows = self._read()
        self._ahead: list[Row] = []

    def digest(self) -> bytes:
        """Return what tells the content from any other, b"" where it can be read only once."""
        if not self.bytes_total:
            return b""
        with Path(self._path).open("rb") as file:
            return file_digest(file, "sha256").digest()

    async def look_ahead(self) -> None:
        """Read the first rows, and the header before them; raises SourceError, OSError."""
        self._ahead = await _in_daemon_thread(lambda: _chunk(self._rows))

    async def rows(self) -> AsyncGenerator[Row, None]:
        """Yield the rows; raises SourceError, OSError."""
        try:
            while chunk := self._ahead or await _in_daemon_thread(lambda: _chunk(self._rows)):
                self._ahead = []
                for row in chunk:
                    yield row
        finally:
            with suppress(ValueError):  # it waits for its next line, and can't be ended
                self._rows.close()

    def _read(self) -> Generator[Row, None, None]:
        is_stdin = self._path == STDIN
        with open(0 if is_stdin else self._path, "rb", closefd=not is_stdin) as file:
            is_gzip = file.peek(2).startswith(GZIP_MAGIC)
            try:
                for row in self.format.rows(gzip.GzipFile(fileobj=file) if is_gzip else file):
                    if self.bytes_total:
                        self.bytes_read = file.raw.tell()
                    yield row
            except (EOFError, zlib.error) as error:
                raise SourceError(f"the gzip data is damaged: {error}") from None


def _chunk(rows: Iterator[Row]) -> list[Row]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            break
    return chunk


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Do as asyncio.to_thread, but don't hold up the exit: standard input may never say another word."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
