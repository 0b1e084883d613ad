"""The send window of a bulk load: which messages wait to be sent, and which for their acks. No I/O."""

from collections import deque
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Window(Generic[Message]):
    """The messages of a load that are not acknowledged, oldest first.

        | sent, waiting for acks | not sent yet |
        ^ oldest                 ^ next_unsent()

    A server refuses a message without ending the stream, if a retry can succeed. The messages sent after it
    then don't follow the last row written, so the server refuses them too. All of them are sent again, once
    the answers to them, which are stale, have arrived.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._messages: deque[Message] = deque()
        self._sent = 0  # of the messages, by the current stream
        self._stale = 0  # answers still to come to messages that will be sent again

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def is_full(self) -> bool:
        """Whether an ack must arrive before the next message is added."""
        return len(self._messages) >= self._size

    @property
    def can_send(self) -> bool:
        """Whether a message is ready to be sent."""
        return not self._stale and self._sent < len(self._messages)

    @property
    def oldest(self) -> Message | None:
        """The message that the next answer is for; None if none was sent."""
        return self._messages[0] if self._sent else None

    def add(self, message: Message) -> None:
        """Append a message."""
        self._messages.append(message)

    def next_unsent(self) -> Message:
        """Return the next message to send, and count it as sent."""
        self._sent += 1
        return self._messages[self._sent - 1]

    def restart(self) -> None:
        """Begin with a new stream, which has been sent nothing."""
        self._sent = self._stale = 0

    def drop_stale_answer(self) -> bool:
        """Return whether the answer that has arrived is stale, and count it."""
        is_stale = self._stale > 0
        if is_stale:
            self._stale -= 1
        return is_stale

    def refuse(self) -> None:
        """Send everything again, after the oldest message was refused."""
        self._stale = self._sent - 1
        self._sent = 0

    def acknowledge(self) -> Message:
        """Remove and return the oldest message, which is settled."""
        self._sent -= 1
        return self._messages.popleft()
