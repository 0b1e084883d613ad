"""What is gathered for the next turn of the event loop, and the log that is written so."""

import asyncio
import io
import logging
from collections.abc import Iterator, Sequence
from select import PIPE_BUF

import pytest

from service.logs import CALL_IDS, Together
from service.turns import Turn


class Stream(io.StringIO):
    """Standard error, and what was written to it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


@pytest.fixture
def written() -> Stream:
    """Standard error."""
    return Stream()


@pytest.fixture
def handler(written: Stream) -> Together:
    """What writes there."""
    handler = Together()
    handler.setStream(written)
    return handler


@pytest.fixture
def log(handler: Together) -> Iterator[logging.Logger]:
    """A logger of the test's own."""
    logger = logging.getLogger("a test's own")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


async def test_what_comes_in_a_turn_is_done_together() -> None:
    """In order, and in no call's context."""
    done: list[Sequence[int]] = []
    contexts = []

    def work(things: Sequence[int]) -> None:
        done.append(things)
        contexts.append(CALL_IDS.get())

    turn = Turn(work)
    CALL_IDS.set({"request_id": "ada's"})
    turn.add(1)
    turn.add(2)
    assert done == []
    await asyncio.sleep(0)
    turn.add(3)
    await asyncio.sleep(0)

    assert done == [[1, 2], [3]]
    assert contexts == [{}, {}]


async def test_an_end_leaves_nothing_for_the_next_turn() -> None:
    """As at the end of the process, when there is no next turn."""
    done: list[Sequence[int]] = []
    turn = Turn(done.append)
    turn.add(1)
    turn.end()
    await asyncio.sleep(0)
    assert done == [[1]]


async def test_lines_of_a_turn_are_one_write(log: logging.Logger, written: Stream) -> None:
    """Which lets go of the interpreter's lock once."""
    log.info("one")
    log.info("two")
    assert written.writes == []
    await asyncio.sleep(0)
    assert written.writes == ["one\ntwo\n"]


async def test_a_write_is_no_larger_than_a_pipe_takes_whole(log: logging.Logger, written: Stream) -> None:
    """Other workers write to the same pipe; a line that is longer is a write of its own."""
    lines = ["é" * 700] * 6 + ["e" * 2 * PIPE_BUF, "short"]
    for line in lines:
        log.info(line)
    await asyncio.sleep(0)

    assert written.getvalue().splitlines() == lines
    assert [text.count("\n") for text in written.writes] == [2, 2, 2, 1, 1]


async def test_a_warning_is_written_at_once(log: logging.Logger, written: Stream) -> None:
    """Behind what came before it."""
    log.info("one")
    log.warning("two")
    assert written.getvalue() == "one\ntwo\n"


async def test_a_thread_s_line_is_written_at_once(log: logging.Logger, written: Stream) -> None:
    """It has no event loop."""
    log.info("one")
    await asyncio.to_thread(log.info, "a thread's")
    assert "a thread's\n" in written.writes


async def test_a_line_that_can_not_be_made_harms_no_other(handler: Together, written: Stream) -> None:
    """As with every handler of the library."""
    for arguments in (("no number",), (2,)):
        handler.emit(logging.makeLogRecord({"msg": "%d", "args": arguments}))
    await asyncio.sleep(0)
    assert written.writes[-1] == "2\n"


async def test_the_end_of_the_process_loses_no_line(
    log: logging.Logger, handler: Together, written: Stream
) -> None:
    """`logging.shutdown` flushes all handlers."""
    log.info("the last")
    handler.flush()
    assert written.getvalue() == "the last\n"
