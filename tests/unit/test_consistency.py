"""Consistency tokens: their order, and which one a channel keeps."""

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from roster.client import Consistency
from roster.consistency import ANY, KEY, PRIMARY
from service.consistency import ANYWHERE, Position, latest, position_from_metadata

POSITIONS = st.builds(
    Position,
    st.integers(1, 2**64 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)


def token(lsn: int, timeline: int = 1, cluster: int = 7) -> str:
    return str(Position(cluster, timeline, lsn))


@given(POSITIONS, POSITIONS)
def test_tokens_compare_as_their_positions(one: Position, other: Position) -> None:
    """So that clients can compare the texts; `primary` is greater than all of them."""
    assert (str(one) < str(other)) == (one < other)
    assert position_from_metadata([str(one)]) == one
    assert str(one) < PRIMARY


@given(st.lists(POSITIONS, min_size=1, max_size=4))
def test_several_values_are_met_by_the_greatest(positions: Sequence[Position]) -> None:
    """Or by the primary, if they are of several clusters or one of them asks for it; `any` adds nothing."""
    texts = [str(position) for position in positions]
    is_one_cluster = len({position.cluster for position in positions}) == 1
    greatest = max(positions) if is_one_cluster else None
    assert position_from_metadata(texts) == greatest
    assert position_from_metadata([*texts, ANY]) == greatest
    assert position_from_metadata([*texts, PRIMARY]) is None
    assert latest([ANYWHERE]) == ANYWHERE


class Writes:
    """The writes of one channel."""

    def __init__(self, consistency: Consistency) -> None:
        self.consistency = consistency
        self._began: dict[str, int] = {}

    def begin(self, *names: str) -> None:
        for name in names:
            self._began[name] = self.consistency.begin()

    def end(self, name: str, received: str) -> None:
        self.consistency.end(((KEY, received),) if received else (), self._began[name])


@pytest.fixture
def writes() -> Writes:
    return Writes(Consistency())


def test_channel_keeps_the_greatest_token_of_overlapping_writes(writes: Writes) -> None:
    writes.begin("a", "b")
    writes.end("b", token(9))
    writes.end("a", token(10))
    assert writes.consistency.token == token(10)
    writes.begin("c", "d")
    writes.end("c", token(12))
    writes.end("d", token(11))
    assert writes.consistency.token == token(12)


@pytest.mark.parametrize("later", [token(3), token(3, timeline=2), token(3, cluster=5)])
def test_later_write_has_the_newer_token(writes: Writes, later: str) -> None:
    """Even if it is smaller, after a restore, a failover or a move to another cluster."""
    writes.begin("a")
    writes.end("a", token(10))
    writes.begin("b")
    writes.end("b", later)
    assert writes.consistency.token == later


@pytest.mark.parametrize("end", [PRIMARY, ""])
def test_write_of_unknown_position_sends_reads_to_the_primary(writes: Writes, end: str) -> None:
    """Until a write has ended that began after it, even if writes never stop overlapping."""
    writes.begin("a")
    writes.end("a", token(1))
    writes.begin("b", "c")
    writes.end("b", end)
    writes.end("c", token(2))
    assert writes.consistency.token == PRIMARY
    writes.begin("d")
    for number in range(3, 9):
        writes.begin("e")
        writes.end("d" if number == 3 else "f", token(number))
        assert writes.consistency.token == token(number)
        writes.begin("f")


def test_any_stays(writes: Writes) -> None:
    writes.consistency = Consistency(ANY)
    writes.begin("a")
    writes.end("a", token(1))
    assert writes.consistency.token == ANY
