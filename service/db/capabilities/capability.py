"""The capabilities that Roster needs from a database."""

from dataclasses import dataclass
from typing import Generic, TypeVar

CheckT = TypeVar("CheckT")


class Missing(Exception):
    """The database answers, but not as Roster needs it; the message says how the answer differs."""


@dataclass(frozen=True)
class Capability(Generic[CheckT]):
    """A capability that Roster needs from a database.

    `check` raises Missing, or the driver's error, if the database lacks it. `feature` is what Roster can't do
    then. Without a required capability, Roster can't use the database at all.
    """

    name: str
    feature: str
    check: CheckT
    is_required: bool = True
