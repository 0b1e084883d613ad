"""Placement of messages in a load, without I/O."""

import pytest
from hypothesis import given, strategies as st

from service.bulk.offsets import Gap, New, Offsets, Placement, Replay, Straddle, place

NUMBERS = st.integers(0, 20)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (10, 5, New()),
        (10, 0, New()),
        (11, 5, Gap(10)),
        (11, 0, Gap(10)),
        (8, 5, Straddle(2)),
        (9, 2, Straddle(1)),
        (5, 5, Replay()),
        (0, 5, Replay()),
        (9, 0, Replay()),
    ],
)
def test_places_a_message_at_watermark_10(offset: int, size: int, expected: Placement) -> None:
    """A message is new, replayed, partly replayed, or leaves a gap."""
    assert place(offset, size, 10) == expected


@given(offset=NUMBERS, size=NUMBERS, watermark=NUMBERS)
def test_placement_agrees_with_each_row(offset: int, size: int, watermark: int) -> None:
    """A row is replayed exactly if it is below the watermark; no row above it may be missing."""
    replayed = sum(row < watermark for row in range(offset, offset + size))

    placement = place(offset, size, watermark)

    match placement:
        case Gap(expected):
            assert offset > expected == watermark
        case New():
            assert (offset, replayed) == (watermark, 0)
        case Replay():
            assert (offset < watermark, replayed) == (True, size)
        case Straddle(count):
            assert 0 < count == replayed < size


def test_message_without_offset_follows_the_one_before() -> None:
    """Also after a refused message."""
    offsets = Offsets(0, largest=100)

    assert offsets.of_message(None, 3) == 0
    assert offsets.of_message(None, 2) == 3
    assert offsets.of_message(50, 5) == 50
    assert offsets.of_message(None, 1) == 55


def test_offset_out_of_range_does_not_overflow_the_next() -> None:
    """The next message begins within the range of offsets, so that it can be answered."""
    offsets = Offsets(0, largest=100)

    offsets.of_message(-7, 2)
    assert offsets.of_message(None, 1) == 2
    offsets.of_message(2**63 - 1, 2)
    assert offsets.of_message(None, 1) == 102


def test_expects_rows_after_accepted_ones_until_they_fail() -> None:
    """A pending batch moves the next new row; a failure moves it back to the watermark."""
    offsets = Offsets(10, largest=100)
    offsets.accept(15)

    assert offsets.place(15, 1) == New()
    offsets.return_to(10)
    assert offsets.place(15, 1) == Gap(10)
