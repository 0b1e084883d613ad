"""The revisions in `alembic/versions`, which this release has.

A migration whose result older code can't use has the attribute `min_revision`: the oldest revision whose code
can run on it. Such a migration is contracting. All others are expanding: the code that could run before them
can run after them too.

The files are parsed, not imported: they import Alembic, which takes a sixth of the time in which a server
starts, and 10 MiB.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SERVICE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Revision:
    """A migration: its number, the oldest revision whose code can run on its result, and its kind."""

    number: str
    min_revision: str
    is_contracting: bool


def config_file() -> Path:
    """Return the path of `alembic.ini`, next to the folder `alembic`: in the wheel, or in the checkout."""
    in_wheel, in_checkout = SERVICE / "alembic.ini", SERVICE.parent / "alembic.ini"
    return in_wheel if in_wheel.exists() else in_checkout


@cache
def revisions() -> tuple[Revision, ...]:
    """Return the revisions of this release, the first one first."""
    scripts = [_constants(path) for path in (config_file().parent / "alembic/versions").glob("*.py")]
    by_predecessor = {script["down_revision"]: script for script in scripts}
    found: list[Revision] = []
    number, min_revision = None, ""
    while script := by_predecessor.get(number):
        number = script["revision"]
        min_revision = script.get("min_revision") or min_revision or number
        found.append(Revision(number, min_revision, is_contracting="min_revision" in script))
    if len(found) != len(scripts):
        raise ValueError(
            "the migrations are not one line: each has one predecessor, and only the first has none"
        )
    return tuple(found)


def _constants(path: Path) -> dict[str, Any]:
    """Return the constants of a migration, such as its `revision`, by name."""
    found: dict[str, Any] = {}
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Constant):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: statement.value.value for target in targets if isinstance(target, ast.Name)}
    return found


def numbers() -> list[str]:
    """Return the numbers of the revisions of this release, the first one first."""
    return [revision.number for revision in revisions()]


def head() -> str:
    """Return the newest revision of this release."""
    return revisions()[-1].number


def pending(number: str | None) -> list[Revision]:
    """Return the revisions after this one; None is an empty database."""
    start = numbers().index(number) + 1 if number else 0
    return list(revisions()[start:])


def last_before_contracting(number: str | None) -> str | None:
    """Return the revision that expanding migrations alone lead to."""
    for revision in pending(number):
        if revision.is_contracting:
            break
        number = revision.number
    return number


def oldest_usable() -> str:
    """Return the oldest revision that this release can run on: that of its last expanding migration."""
    return [revision.number for revision in revisions() if not revision.is_contracting][-1]
