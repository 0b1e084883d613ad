"""The files of a SQLite database: where they are, how they are created, and who can access them."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shlex import join

from sqlalchemy import make_url

from service.files import create

FOUR_SLASHES = "; an absolute path needs four slashes, as in sqlite:////var/lib/roster.db"
SQLITE_SUFFIXES = ("", "-wal", "-shm", "-journal")


def sqlite_path(url: str) -> Path:
    """Return the file of a SQLite database; with `uri=true` the path in its URL starts with `file:`."""
    parsed = make_url(url)
    return Path((parsed.database or "").removeprefix("file:" if "uri" in parsed.query else ""))


def create_database(url: str) -> None:
    """Create an empty SQLite database file if it is missing; SQLite itself would use the mode of the umask.

    SQLite gives `-wal`, `-shm` and `-journal` the mode of the database.
    """
    # An existing file must not even be opened: closing it would drop the locks that SQLite has on it.
    # If it can't be created, SQLite reports why.
    if make_url(url).query.get("mode", "rwc") == "rwc":
        with suppress(OSError):
            create(sqlite_path(url).resolve()).close()


def storage_problem(url: str) -> str:
    """Return why SQLite can't write to a database, and what to do; "" if it can.

    SQLite itself would open it, answer reads, and refuse each write.
    """
    path, query = sqlite_path(url), make_url(url).query
    if "uri" in query and (query.get("mode") == "ro" or "immutable" in query):
        return "the URL opens the database read-only; remove mode=ro and immutable from ROSTER_DATABASE_URL"
    if not path.parent.is_dir():
        hint = "" if path.is_absolute() else FOUR_SLASHES
        return f"directory {path.parent} does not exist; create it first{hint}"
    folder = path.resolve().parent
    if not _is_writable(folder):
        return (
            f"directory {folder} can't be written by this user, but SQLite creates files in it; "
            "change its owner or mode, mount it writable, or name another file in ROSTER_DATABASE_URL"
        )
    for suffix in SQLITE_SUFFIXES:
        file = Path(f"{path}{suffix}")
        if file.exists() and not _is_writable(file):
            return (
                f"file {file} can't be written by this user; change its owner or mode, mount it writable, or "
                "name another file in ROSTER_DATABASE_URL"
            )
    return ""


def file_dangers(url: str) -> Iterator[str]:
    """Yield a sentence for each way in which other users of this machine can access a SQLite database."""
    path = sqlite_path(url)
    files = [Path(f"{path}{suffix}") for suffix in SQLITE_SUFFIXES]
    if open_files := [str(file) for file in files if _mode(file) & stat.S_IRWXO]:
        yield f"other users can open the database and its password hashes; run: chmod 600 {join(open_files)}"
    folder = path.resolve().parent
    if _mode(folder) & stat.S_IWOTH:
        yield f"other users can create files in {folder}, next to the database; give it its own folder"


def _is_writable(path: Path) -> bool:
    needed = os.W_OK | os.X_OK if path.is_dir() else os.R_OK | os.W_OK
    return os.access(path, needed, effective_ids=os.access in os.supports_effective_ids)


def _mode(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mode
    return 0
