"""Rules for the offsets of a bulk stream. Pure: no I/O, no errors of the contract."""

from dataclasses import dataclass

# A row's offset is its position in the load. The rows below the watermark are committed, those above it are
# not. A message may begin anywhere up to the next new row:
#
#     committed rows | next new row
#     ---------------+-------------
#        [ Replay ]  |                 all rows are committed: their first outcomes are the answer
#             [ Straddle ]             the first rows are committed, the rest is new
#                    [   New   ]       all rows are new
#                    |    [  Gap  ]    rows are missing in between: nothing can be written


@dataclass(frozen=True)
class Replay:
    """All rows of a message were committed before."""


@dataclass(frozen=True)
class Straddle:
    """The first `replayed` rows of a message were committed before, the others are new."""

    replayed: int


@dataclass(frozen=True)
class New:
    """All rows of a message are new."""


@dataclass(frozen=True)
class Gap:
    """The rows between `expected` and the message are missing."""

    expected: int


Placement = Replay | Straddle | New | Gap


def place(offset: int, size: int, expected: int) -> Placement:
    """Return which rows of a message are new, if `expected` is the offset of the next new row."""
    if offset > expected:
        return Gap(expected)
    if offset == expected:
        return New()
    if offset + size <= expected:
        return Replay()
    return Straddle(expected - offset)


class Offsets:
    """The position of one stream in its load."""

    def __init__(self, watermark: int, largest: int) -> None:
        self.expected = watermark  # the next new row, if all pending batches commit
        self._largest = largest
        self._end = 0  # the end of the last message, accepted or not

    def of_message(self, offset: int | None, size: int) -> int:
        """Return the offset of the next message: the one given, or the end of the message before."""
        if offset is None:
            offset = self._end
        self._end = min(max(offset, 0), self._largest) + size
        return offset

    def place(self, offset: int, size: int) -> Placement:
        """Return which rows of a message are new."""
        return place(offset, size, self.expected)

    def accept(self, end: int) -> None:
        """Expect the rows after a message that is pending."""
        self.expected = max(self.expected, end)

    def return_to(self, watermark: int) -> None:
        """Expect the rows after the committed ones: no batch is pending any more."""
        self.expected = watermark
