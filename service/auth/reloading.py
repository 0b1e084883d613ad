"""Files that are replaced while the server runs: certificates, keys, the policy."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class ReloadingFile(Generic[T]):
    """What `read` makes of some files' contents, anew whenever they change.

    At first it raises OSError for files that can't be used. Later ones are logged, and what was there before
    stays in use: a certificate and its key are not replaced at the same instant.
    """

    def __init__(self, read: Callable[..., T], *paths: Path) -> None:
        self._read = read
        self._paths = paths
        self._seen = self._marks()
        self._content = self._load()

    def current(self) -> T:
        """Return what is in the files now."""
        self.update()
        return self._content

    def update(self) -> T | None:
        """Return what is in the files now, None where that is what was there before."""
        seen = self._marks()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            self._content = self._load()
        except OSError as error:
            log.error("%s; what was there before stays in use", error)  # noqa: TRY400 - it says all
            return None
        log.info("read again: %s", self._names())
        return self._content

    def _load(self) -> T:
        try:
            return self._read(*(path.read_bytes() for path in self._paths))
        except Exception as error:  # whatever a parser raises
            raise OSError(f"can't use {self._names()}: {error}") from error

    def _marks(self) -> list[tuple[int, ...] | None]:
        return [_mark(path) for path in self._paths]

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


def _mark(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - on the way of every call
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
