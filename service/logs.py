"""The log: one line an event, as JSON or for a terminal, with the ids of the call that it belongs to.

Messages, fields and exceptions can hold text of callers. The formatters escape it, so that it can neither
begin a line nor control a terminal; no code that logs has to.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from select import PIPE_BUF
from typing import Any, Literal, TextIO

import orjson

from service.escape import MAX_CHARACTERS, escape, shorten
from service.turns import Turn

Format = Literal["auto", "json", "text"]

# What every line of a call carries. A line's own fields come as `extra={"fields": {...}}`.
CALL_IDS: ContextVar[Mapping[str, str]] = ContextVar("CALL_IDS", default={})  # noqa: B039  (nobody changes it)

# Loggers of libraries that log the values they were working on.
TALKATIVE = ("grpc", "asyncio")
PLAIN_MESSAGE = re.compile(r'(?!["{\[])[^=]*')
PLAIN_VALUE = re.compile(r'(?!["{\[])[^\s="]+')
FRAME = re.compile(r'[ |+]*File "')  # of a traceback


def configure(level: str, form: Format) -> None:
    """Write the log to standard error; `auto` is JSON unless that is a terminal."""
    is_text = sys.stderr.isatty() if form == "auto" else form == "text"
    handler = Together()
    handler.setFormatter(Text("%(asctime)s %(levelname)-7s %(name)s: %(message)s") if is_text else Json())
    handler.addFilter(drop_values)
    logging.basicConfig(level=level, handlers=[handler])
    # No line shows them, and to ask for them takes a third of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 - https://docs.python.org/3/howto/logging.html#optimization


def escape_failures() -> None:
    """Format an exception that ends the process, and records before `configure`, as the text log does."""
    formatter = Text("%(levelname)s %(name)s: %(message)s")

    def write(*failure: Any) -> None:
        sys.stderr.write(f"{formatter.formatException(failure)}\n")

    sys.excepthook = write
    if logging.lastResort:
        logging.lastResort.setFormatter(formatter)
        logging.lastResort.addFilter(drop_values)


class Together(logging.StreamHandler[TextIO]):
    """Writes together what is logged in one turn of the event loop; a warning, or a thread's line, at once.

    A write lets go of the interpreter's lock, for which a thread of gRPC's waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turn = Turn(self._write)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + self.terminator
            try:
                self._turn.add(line)
            except RuntimeError:
                self._write([line])
            if record.levelno >= logging.WARNING:
                self.flush()
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        # The standard library's prints the arguments.
        with suppress(Exception):
            self.stream.write(f"a line of the logger {record.name} could not be written\n")

    def flush(self) -> None:
        self._turn.end()
        super().flush()

    def _write(self, lines: Sequence[str]) -> None:
        for together in _joined(lines):
            self.stream.write(together)
            self.stream.flush()


def _joined(lines: Sequence[str]) -> Iterator[str]:
    """Yield as many lines at once as a pipe takes without tearing them: other workers write to it too."""
    joined = b""
    for line in map(str.encode, lines):
        if joined and len(joined) + len(line) > PIPE_BUF:
            yield joined.decode()
            joined = b""
        joined += line
    yield joined.decode()


def drop_values(record: logging.LogRecord) -> bool:
    """Reduce a record of gRPC or asyncio to the kind of the event and where it happened.

    Their messages and exceptions repeat what was received: gRPC logs a value of `authorization` that is not
    UTF-8, and asyncio the arguments of a callback that failed.
    """
    if record.name.partition(".")[0] in TALKATIVE:
        # asyncio formats its messages itself: values are in parentheses or on further lines.
        record.msg = re.split(r"[(\n]", re.sub(r"%\w", "…", str(record.msg)), maxsplit=1)[0].rstrip()
        record.args = ()
        if record.exc_info and record.exc_info[0]:
            kind, _, frames = record.exc_info
            record.exc_info = (Exception, Exception(kind.__name__), frames)
    return True


class Json(logging.Formatter):
    """A JSON object a line; characters that are not printable are escaped."""

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
    """A line to read: the message, then the fields as `name=value`.

    A message or a value that could be taken for something else is a JSON string. The lines of a traceback
    are indented, so that none looks like an event.
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
    """Return the lines of a part of a traceback; the line breaks of an exception's text are not its own."""
    return chunk.splitlines() if FRAME.match(chunk) else [chunk.strip("\n")]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {**CALL_IDS.get(), **getattr(record, "fields", {})}


def _text(value: Any) -> str:
    return _quote(value, PLAIN_VALUE) if isinstance(value, str) else escape(_json(value))


def _quote(text: str, plain: re.Pattern[str]) -> str:
    """Return a text as it is if that can't be misread, otherwise as a JSON string."""
    text = shorten(text)
    return text if text.isprintable() and plain.fullmatch(text) else escape(_json(text))


def _shorten_text(value: Any) -> Any:
    return shorten(value) if isinstance(value, str) else value


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # lone surrogates, integers of more than 64 bits
        return json.dumps(value, default=str)
