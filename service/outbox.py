"""What a bulk load keeps to send, and to send again."""

from google.protobuf.message import Message

ROW_FRAMING_BYTES = 6  # a tag, and a length below 4 GiB
MESSAGE_FRAMING_BYTES = 64


class Outbox:
    """The rows that are not acknowledged: those sent, and behind them those of the next message.

    Like the send buffer of TCP: `first` is the offset of the oldest row, `position` is where sending goes on.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self.first = 0
        self._rows: list[Message] = []
        self._sizes: list[int] = []
        self._sent = 0
        self._unsent_bytes = 0
        self.max_rows = max_rows
        self._max_bytes = max_bytes - MESSAGE_FRAMING_BYTES

    @property
    def position(self) -> int:
        """The offset of the next row to send."""
        return self.first + self._sent

    def limit(self, max_rows: int, max_bytes: int) -> None:
        """Cut messages as the server allows."""
        self.max_rows = min(self.max_rows, max_rows)
        self._max_bytes = max_bytes - MESSAGE_FRAMING_BYTES

    def add(self, row: Message) -> None:
        """Put a row behind the others."""
        size = row.ByteSize() + ROW_FRAMING_BYTES
        self._rows.append(row)
        self._sizes.append(size)
        self._unsent_bytes += size

    def is_empty(self) -> bool:
        """Tell whether all rows are acknowledged."""
        return not self._rows

    def has_unsent(self) -> bool:
        """Tell whether there is a row to send."""
        return self._sent < len(self._rows)

    def is_full(self) -> bool:
        """Tell whether a message can be cut that no further row would fit into."""
        return len(self._rows) - self._sent >= self.max_rows or self._unsent_bytes >= self._max_bytes

    def take(self) -> list[Message]:
        """Return the rows of the next message."""
        size, end = 0, self._sent
        last = min(len(self._rows), self._sent + self.max_rows)
        while end < last and (size := size + self._sizes[end]) <= self._max_bytes:
            end += 1
        # A row that is too large goes alone: the server says so.
        end = max(end, min(self._sent + 1, last))
        rows = self._rows[self._sent : end]
        self._unsent_bytes -= sum(self._sizes[self._sent : end])
        self._sent = end
        return rows

    def forget_below(self, offset: int) -> None:
        """Drop rows that are acknowledged."""
        count = offset - self.first
        self.first = offset
        self._sent -= count
        del self._rows[:count], self._sizes[:count]

    def go_back(self) -> None:
        """Send again what is not acknowledged."""
        self._sent = 0
        self._unsent_bytes = sum(self._sizes)
