"""gzip and zstd files. Before Python 3.14, zstd requires the package backports.zstd."""

import gzip
import zlib
from io import BufferedReader
from typing import IO, Any

from service.cli.terminal import UsageError

try:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    try:
        from backports import zstd  # type: ignore[no-redef, unused-ignore]
    except ImportError:
        zstd = None  # type: ignore[assignment, unused-ignore]

GZIP, ZSTD = ".gz", ".zst"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# pzstd begins with a frame without content, by its last three bytes:
# https://www.rfc-editor.org/rfc/rfc8878#section-3.1.2
SKIPPABLE_MAGICS = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
GZIP_LEVEL = 6
DAMAGED: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
if zstd:
    DAMAGED = (*DAMAGED, zstd.ZstdError)


class GzipStream(gzip.GzipFile):
    """A gzip file that knows whether it can be read again from its beginning."""

    def __init__(self, file: BufferedReader) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._compressed = file

    def seekable(self) -> bool:
        return self._compressed.seekable()


def without_compression(name: str) -> str:
    """Return the name of a file without the ending of a compression."""
    return name.removesuffix(GZIP).removesuffix(ZSTD)


def decompress(file: BufferedReader) -> BufferedReader:
    """Return the content of a file that may be compressed, as its first bytes say; raises UsageError.

    Reading it raises one of DAMAGED if the file is truncated or has changed.
    """
    start = file.peek(len(ZSTD_MAGIC))
    if start.startswith(GZIP_MAGIC):
        return BufferedReader(GzipStream(file))
    if start.startswith((ZSTD_MAGIC, *SKIPPABLE_MAGICS)):
        _require_zstd()
        return BufferedReader(zstd.ZstdFile(file))
    return file


def compress(file: IO[bytes], name: str) -> Any:
    """Return a file that compresses what is written to it, as its name says; raises UsageError."""
    if name.endswith(GZIP):
        return gzip.open(file, "wb", compresslevel=GZIP_LEVEL)
    if name.endswith(ZSTD):
        _require_zstd()
        return zstd.ZstdFile(file, "wb", options={zstd.CompressionParameter.checksum_flag: 1})
    return file


def _require_zstd() -> None:
    if not zstd:
        raise UsageError("zstd requires backports.zstd; in a clone: .venv/bin/pip install backports.zstd")
