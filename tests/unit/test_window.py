"""The send window of a bulk load: its rules, without a server."""

from hypothesis import given, strategies as st

from roster.client.window import Window


def window_of(*messages: str, size: int = 4) -> Window[str]:
    """Return a window with these messages."""
    window: Window[str] = Window(size)
    for message in messages:
        window.add(message)
    return window


def send_all(window: Window[str]) -> list[str]:
    """Send everything that can be sent."""
    sent = []
    while window.can_send:
        sent.append(window.next_unsent())
    return sent


def test_sends_and_acknowledges_in_order() -> None:
    """The oldest message is the one that the next ack is for."""
    window = window_of("a", "b")

    assert window.oldest is None
    assert send_all(window) == ["a", "b"]
    assert [window.oldest, window.acknowledge(), window.oldest] == ["a", "a", "b"]


def test_is_full_until_an_ack_arrives() -> None:
    """Sending a message does not make room for another."""
    window = window_of("a", "b", size=2)
    send_all(window)

    assert window.is_full
    window.acknowledge()
    assert not window.is_full


def test_resends_after_the_stale_answers_have_arrived() -> None:
    """The server refuses the messages after a refused one too; their answers must not settle anything."""
    window = window_of("a", "b", "c")
    send_all(window)

    window.refuse()

    assert not window.can_send
    assert [window.drop_stale_answer() for _ in range(3)] == [True, True, False]
    assert send_all(window) == ["a", "b", "c"]


def test_a_new_stream_resends_everything() -> None:
    """Answers on the old stream will never arrive."""
    window = window_of("a", "b", "c")
    send_all(window)
    window.acknowledge()
    window.refuse()

    window.restart()

    assert not window.drop_stale_answer()
    assert send_all(window) == ["b", "c"]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_each_message_is_acknowledged_once_in_order(refusals: list[bool], size: int) -> None:
    """Whatever the server refuses, and however full the window is."""
    window: Window[int] = Window(size)
    added, acknowledged = 0, []
    in_flight: list[int] = []
    for is_refused in [*refusals, *[False] * 10]:
        while not window.is_full:
            window.add(added)
            added += 1
        while window.can_send:
            in_flight.append(window.next_unsent())
        assert in_flight.pop(0) == window.oldest
        if is_refused:
            window.refuse()
            while window.drop_stale_answer():
                in_flight.pop(0)
        else:
            acknowledged.append(window.acknowledge())

    assert acknowledged == list(range(len(acknowledged)))
