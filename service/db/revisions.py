"""The revisions in `alembic/versions`, which this release has.

A migration whose result older code can't use has the attribute `min_revision`: the oldest revision whose code
can run on it. Such a migration is contracting. All others are expanding: the code that could run before them
can run after them too.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory

SERVICE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Revision:
    """A migration: its number, the oldest revision whose code can run on its result, and its kind."""

    number: str
    min_revision: str
    is_contracting: bool


def config(url: str = "") -> Config:
    """Return Alembic's configuration for a database; without a URL, for the one in the settings."""
    in_wheel, in_checkout = SERVICE / "alembic.ini", SERVICE.parent / "alembic.ini"
    configuration = Config(in_wheel if in_wheel.exists() else in_checkout)
    configuration.attributes["url"] = url
    return configuration


@cache
def revisions() -> tuple[Revision, ...]:
    """Return the revisions of this release, the first one first."""
    scripts = [*ScriptDirectory.from_config(config()).walk_revisions()][::-1]
    min_revision, found = scripts[0].revision, []
    for script in scripts:
        raised = getattr(script.module, "min_revision", None)
        min_revision = raised or min_revision
        found.append(Revision(script.revision, min_revision, is_contracting=raised is not None))
    return tuple(found)


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
