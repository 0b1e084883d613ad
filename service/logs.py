"""The log: one line for each event, as JSON or as text, with the ids of its call.

Messages, fields and exceptions can contain text from callers. The formatters escape it, so that it can
neither begin a line nor control a terminal; code that logs needs no precautions.
"""

import asyncio
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar
from datetime import UTC, datetime
from select import PIPE_BUF
from types import TracebackType
from typing import Any, Literal, TextIO

import orjson

from service.escape import MAX_CHARACTERS, escape, shorten

Format = Literal["auto", "json", "text"]

# Fields of every line of a call. A line's own fields are passed as `extra={"fields": {...}}`.
CALL_IDS: ContextVar[Mapping[str, str]] = ContextVar("CALL_IDS", default={})  # noqa: B039  (never changed)

# Loggers of libraries whose lines contain the values they were working on.
TALKATIVE = re.compile(r"(grpc|asyncio|opentelemetry\.util)(\.|$)")
PLAIN_MESSAGE = re.compile(r'(?!["{\[])[^=]*')
PLAIN_VALUE = re.compile(r'(?!["{\[])[^\s="]+')
FRAME = re.compile(r'[ |+]*File "')  # of a traceback


def configure(level: str, form: Format) -> None:
    """Write the log to standard error; `auto` means text on a terminal, otherwise JSON."""
    is_text = sys.stderr.isatty() if form == "auto" else form == "text"
    handler = BufferedStreamHandler()
    handler.setFormatter(Text("%(asctime)s %(levelname)-7s %(name)s: %(message)s") if is_text else Json())
    handler.addFilter(drop_values)
    logging.basicConfig(level=level, handlers=[handler])
    # No line shows these, and collecting them takes a third of the time of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 - https://docs.python.org/3/howto/logging.html#optimization


def escape_failures() -> None:
    """Format an exception that ends the process, and records logged before `configure`, like the text log."""
    formatter = Text("%(levelname)s %(name)s: %(message)s")

    def write(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(f"{formatter.formatException((kind, error, trace))}\n")

    sys.excepthook = write
    if logging.lastResort:
        logging.lastResort.setFormatter(formatter)
        logging.lastResort.addFilter(drop_values)


class BufferedStreamHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one event-loop iteration together; a warning, or a thread's line, at once.

    Like `logging.handlers.MemoryHandler`, it buffers records and formats them when they are flushed, so the
    objects they refer to must not change. Formatting and writing lines together takes half as long as doing
    so between calls: each write releases the GIL, and gRPC's threads are waiting for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        self.addFilter(add_call_ids)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
        if record.levelno >= logging.WARNING or not self._will_flush():
            self.flush()

    def flush(self) -> None:
        self.acquire()  # a thread's line also flushes those of the event loop
        try:
            records, self._records = self._records, []
            for lines in _join([self._format(record) for record in records]):
                self.stream.write(lines)
                super().flush()
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(records[-1])
        finally:
            self.release()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        # The inherited method prints the arguments.
        with suppress(Exception):
            self.stream.write(f"a line of the logger {record.name} could not be written\n")

    def _will_flush(self) -> bool:
        """Schedule a flush unless there is one already; return False if no event loop runs here."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if len(self._records) == 1:
            loop.call_soon(self.flush, context=Context())
        return True

    def _format(self, record: logging.LogRecord) -> bytes:
        """Return a record as a line; empty if formatting fails, so that other lines are not affected."""
        try:
            return f"{self.format(record)}{self.terminator}".encode()
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(record)
            return b""


def _join(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield lines, joined up to PIPE_BUF: longer writes could mix with those of other workers."""
    joined = b""
    for line in lines:
        if joined and len(joined) + len(line) > PIPE_BUF:
            yield joined.decode()
            joined = b""
        joined += line
    if joined:
        yield joined.decode()


def add_call_ids(record: logging.LogRecord) -> bool:
    """Add the ids of the current call to a record, which is formatted in another context."""
    record.call_ids = CALL_IDS.get()
    return True


def drop_values(record: logging.LogRecord) -> bool:
    """Reduce a record of a talkative library to the kind of event and where it happened.

    Their messages and exceptions repeat what was received: gRPC logs a value of `authorization` that is not
    UTF-8, asyncio the arguments of a callback that failed, and OpenTelemetry a header with a key in it.
    """
    if TALKATIVE.match(record.name):
        # asyncio formats its messages itself: values are in parentheses or on further lines.
        record.msg = re.split(r"[(\n]", re.sub(r"%\w", "…", str(record.msg)), maxsplit=1)[0].rstrip()
        record.args = ()
        if record.exc_info and record.exc_info[0]:
            kind, _, frames = record.exc_info
            record.exc_info = (Exception, Exception(kind.__name__), frames)
    return True


class Json(logging.Formatter):
    """One JSON object a line; unprintable characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = _json(line)
        if len(text) > MAX_CHARACTERS:
            text = _json({name: _shorten_text(value) for name, value in line.items()})
        return escape(text)


class Text(logging.Formatter):
    """Text lines: the message, then the fields as `name=value`.

    An ambiguous message or value is written as a JSON string. The lines of a traceback are indented, so that
    none of them looks like an event.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = _quote(record.message, PLAIN_MESSAGE)
        fields = "".join(f" {name}={_text(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = [line for chunk in traceback.format_exception(*ei) for line in _own_lines(chunk)]
        return "\n".join(f"  {shorten(escape(line))}" for line in lines)

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return "\n".join(f"  {escape(line)}" for line in stack_info.splitlines())


def _own_lines(chunk: str) -> Sequence[str]:
    """Return the lines of a chunk of a traceback; an exception's own text is not split."""
    return chunk.splitlines() if FRAME.match(chunk) else [chunk.strip("\n")]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    call_ids = getattr(record, "call_ids", None)
    if call_ids is None:  # another handler formats records at once
        call_ids = CALL_IDS.get()
    return {**call_ids, **getattr(record, "fields", {})}


def _text(value: Any) -> str:
    return _quote(value, PLAIN_VALUE) if isinstance(value, str) else escape(_json(value))


def _quote(text: str, plain: re.Pattern[str]) -> str:
    """Return a text unchanged if it can't be misread, otherwise as a JSON string."""
    text = shorten(text)
    return text if text.isprintable() and plain.fullmatch(text) else escape(_json(text))


def _shorten_text(value: Any) -> Any:
    return shorten(value) if isinstance(value, str) else value


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # lone surrogates, integers of more than 64 bits
        return json.dumps(value, default=str)
