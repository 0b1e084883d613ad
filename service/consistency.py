"""Consistency tokens: how new the data must be that a read returns.

A token names a position in the write-ahead log of PostgreSQL. The server returns one with each write, and a
read that carries it sees that write, wherever it is answered. Its fields have fixed widths, so that of two
tokens of one cluster, the greater text is the newer: clients need no other knowledge of them.
"""

import re
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from typing import NamedTuple

from roster.consistency import ANY, KEY, PRIMARY
from roster.errors import InvalidToken

TOKEN = re.compile(r"([0-9a-f]{16})-([0-9a-f]{8})-([0-9a-f]{16})")


class Position(NamedTuple):
    """A position in the write-ahead log: of which cluster, on which timeline, and the LSN there."""

    cluster: int
    timeline: int
    lsn: int

    def __str__(self) -> str:
        return f"{self.cluster:016x}-{self.timeline:08x}-{self.lsn:016x}"


ANYWHERE = Position(0, 0, 0)  # what `any` asks for; no cluster has this identifier


class Requirement(NamedTuple):
    """The position that a replica must have replayed to answer a read, and when the read must have ended.

    The deadline is in the loop's time, None if there is none.
    """

    position: Position
    deadline: float | None = None


class Writes:
    """The writes of one call."""

    is_outcome_unknown = False  # of a commit, which may still happen


# Of the current call; None means that only the primary may answer. Set by `interceptors/consistency.py`.
_current: ContextVar[Requirement | None] = ContextVar("requirement", default=None)
# Of the current call and of its tasks, for `interceptors/consistency.py`.
_writes: ContextVar[Writes | None] = ContextVar("writes", default=None)


def begin_writes() -> Writes:
    """Return the record of the writes that the current call and its tasks are going to make."""
    writes = Writes()
    _writes.set(writes)
    return writes


def note_unknown_outcome() -> None:
    """Note that a commit of the current call may still happen: no position is certain to include it."""
    if writes := _writes.get():
        writes.is_outcome_unknown = True


def set_requirement(requirement: Requirement | None) -> None:
    """Set what the reads of the current call require."""
    _current.set(requirement)


def current_requirement() -> Requirement | None:
    """Return what the reads of the current call require; None outside of calls: the primary."""
    return _current.get()


def position_from_metadata(values: Sequence[str]) -> Position | None:
    """Return the position that all the values of the key ask for, None for the primary.

    Raises InvalidToken.
    """
    positions = [_position_from_text(value) for value in values]
    known = [position for position in positions if position]
    return latest(known) if len(known) == len(positions) else None


def latest(positions: Collection[Position]) -> Position | None:
    """Return the position at which all the others are reached too; None if they are of several clusters."""
    clusters = {position.cluster for position in positions if position != ANYWHERE}
    return max(positions, default=None) if len(clusters) <= 1 else None


def _position_from_text(text: str) -> Position | None:
    if text == PRIMARY:
        return None
    if text == ANY:
        return ANYWHERE
    token = TOKEN.fullmatch(text)
    if token is None:
        raise InvalidToken(
            f"the metadata {KEY} is not a token; send the {KEY} of a write's trailing metadata, `{ANY}`, or "
            f"`{PRIMARY}`"
        )
    return Position(*(int(part, 16) for part in token.groups()))
