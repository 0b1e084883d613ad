"""The file with the token of a watch."""

import fcntl
import os
from pathlib import Path
from typing import IO

import click

from service.cli.terminal import UsageError
from service.files import create, is_written_in_place

OPTION = "--watch-token-file"
PATH = click.Path(path_type=Path, dir_okay=False)


class WatchTokenFile:
    """A file with the token of the last response that was written. One process at a time may use it.

    The file is replaced as a whole, so it always has a complete token. It is locked while it is in use: of
    two watches, each would store a position for changes that only the other one has written.
    """

    def __init__(self, path: Path) -> None:
        if is_written_in_place(path):
            raise UsageError(f"{OPTION} {path} is a device or a pipe; name a file")
        self.path = path.resolve()  # a symlink stays one
        self._file: IO[bytes] | None = None  # keeps the lock

    def read(self) -> str:
        """Lock the file, and return its token, "" if it does not exist; raises UsageError."""
        self.lock()
        if not self._file:
            return ""
        try:
            token = self._file.read().decode("ascii").strip()
        except UnicodeDecodeError:
            token = ""
        if not token:
            raise UsageError(f"{OPTION} {self.path} contains no token; remove it, or name another file")
        return token

    def lock(self) -> None:
        """Lock the file, if it exists; raises UsageError."""
        try:
            self._lock(self.path.open("rb"))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._error("can't be read", error) from None

    def store(self, token: str) -> None:
        """Store a token, durably; raises UsageError."""
        part = Path(f"{self.path}.part")
        try:
            part.unlink(missing_ok=True)
            with create(part) as file:
                file.write(f"{token}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            self._lock(part.open("rb"))
            part.replace(self.path)
        except OSError as error:
            raise self._error("can't be written", error) from None

    def close(self) -> None:
        """Unlock the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(
                f"{OPTION} {self.path} is in use by another process; each watch needs a file of its own"
            ) from None
        self.close()
        self._file = file

    def _error(self, problem: str, error: OSError) -> UsageError:
        return UsageError(f"{OPTION} {self.path} {problem}: {error.strerror}")
