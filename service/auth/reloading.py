"""Files that are reloaded when they change: certificates, keys, the policy."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class ReloadingFile(Generic[T]):
    """The result of `read`, called with the contents of files again whenever one of them changes.

    The first read raises OSError for files that can't be used. A later failure is logged, and the previous
    content stays in use: a certificate and its key are not replaced at the same instant.
    """

    def __init__(self, read: Callable[..., T], *paths: Path) -> None:
        self._read = read
        self._paths = paths
        self._seen = self._marks()
        self._content = self._load()

    def current(self) -> T:
        """Return the current content."""
        self.update()
        return self._content

    def update(self) -> T | None:
        """Read changed files and return their content; None if nothing changed, or it can't be used."""
        seen = self._marks()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            self._content = self._load()
        except OSError as error:
            log.error("%s; the previous content stays in use", error)  # noqa: TRY400 - the message says everything
            return None
        log.info("reloaded %s", self._names())
        return self._content

    def _load(self) -> T:
        try:
            return self._read(*(path.read_bytes() for path in self._paths))
        except Exception as error:  # each parser raises errors of its own
            raise OSError(f"can't use {self._names()}: {error}") from error

    def _marks(self) -> list[tuple[int, ...] | None]:
        return [_mark(path) for path in self._paths]

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


def _mark(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - faster, and done for every call
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
