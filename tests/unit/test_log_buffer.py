"""The handler that writes the log buffers lines for one iteration of the event loop."""

import asyncio
import io
import logging
from collections.abc import Iterator
from select import PIPE_BUF

import pytest

from service.logs import CALL_IDS, BufferedStreamHandler, Text


class Stream(io.StringIO):
    """Standard error, with the list of writes to it."""

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
def handler(written: Stream) -> BufferedStreamHandler:
    """A handler that writes to it."""
    handler = BufferedStreamHandler()
    handler.setStream(written)
    handler.setFormatter(Text("%(message)s"))
    return handler


@pytest.fixture
def log(handler: BufferedStreamHandler) -> Iterator[logging.Logger]:
    """A logger with this handler."""
    logger = logging.getLogger("a test's own")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


async def test_lines_carry_the_ids_of_their_calls(log: logging.Logger, written: Stream) -> None:
    """They are formatted later, outside of the call's context."""

    async def call(request_id: str) -> None:
        CALL_IDS.set({"request_id": request_id})
        log.info("a line")

    await asyncio.gather(call("ada's"), call("alan's"))
    await asyncio.sleep(0)
    assert written.getvalue().splitlines() == [
        "a line request_id=ada's",
        "a line request_id=alan's",
    ]


async def test_lines_of_one_iteration_are_one_write(log: logging.Logger, written: Stream) -> None:
    """A write releases the GIL, so one is cheaper than several."""
    for lines in ("one", "two"), ("three", "four"):
        written.writes.clear()
        for line in lines:
            log.info(line)
        assert written.writes == []
        await asyncio.sleep(0)
        assert written.writes == ["\n".join(lines) + "\n"]


async def test_lines_are_joined_up_to_pipe_buf(log: logging.Logger, written: Stream) -> None:
    """Other workers write to the same pipe; a longer line is written alone."""
    lines = ["e" * 1400] * 6 + ["e" * 2 * PIPE_BUF, "short"]
    for line in lines:
        log.info(line)
    await asyncio.sleep(0)

    assert written.getvalue().splitlines() == lines
    assert [text.count("\n") for text in written.writes] == [2, 2, 2, 1, 1]


async def test_warning_is_written_at_once(log: logging.Logger, written: Stream) -> None:
    """After the lines before it; those after it are buffered again."""
    log.info("one")
    log.warning("two")
    log.info("three")
    assert written.getvalue() == "one\ntwo\n"
    await asyncio.sleep(0)
    assert written.getvalue() == "one\ntwo\nthree\n"


async def test_line_of_a_thread_is_written_at_once(log: logging.Logger, written: Stream) -> None:
    """A thread has no event loop that would flush it."""
    await asyncio.to_thread(log.info, "from a thread")
    assert written.getvalue() == "from a thread\n"


async def test_line_that_cannot_be_formatted_affects_no_other(
    handler: BufferedStreamHandler, written: Stream
) -> None:
    """It is replaced by a line without its arguments."""
    for argument in ("not a number", 2):
        handler.handle(
            logging.makeLogRecord({"msg": "%d", "args": (argument,), "name": "test", "levelno": logging.INFO})
        )
    await asyncio.sleep(0)
    assert written.getvalue() == "a line of the logger test could not be written\n2\n"


async def test_flush_writes_buffered_lines(
    log: logging.Logger, handler: BufferedStreamHandler, written: Stream
) -> None:
    """`logging.shutdown` flushes all handlers at the end of the process."""
    log.info("the last")
    handler.flush()
    assert written.getvalue() == "the last\n"
