"""Creates files with secrets: only their owner can read them, and a planted symlink can't redirect them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

OWNER_ONLY = 0o600


def create(path: Path, mode: int = OWNER_ONLY) -> IO[bytes]:
    """Create a file and open it to write; raises FileExistsError if anything has its name, even a symlink."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))


@contextmanager
def replace_when_complete(path: Path) -> Iterator[IO[bytes]]:
    """Write a file as `.part` and rename it when it is complete; raises OSError.

    A `.part` of an earlier run is removed, even if it is a symlink. A pipe or a device is written in place.
    """
    if is_written_in_place(path):
        with path.open("wb") as file:
            yield file
        return
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)
    with create(part) as file:
        yield file
        if not os.path.samestat(os.fstat(file.fileno()), part.lstat()):
            raise FileExistsError(f"another export is writing {path} too")
    part.replace(path)


def is_written_in_place(path: Path) -> bool:
    """Return whether a path is a pipe or a device, such as /dev/stdout, which can't be replaced."""
    with suppress(OSError):
        kind = path.stat().st_mode
        is_descriptor = path.is_symlink() and path.parts[:2] in (("/", "dev"), ("/", "proc"))
        return is_descriptor or stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)
    return False
