"""The log: one line an event, as JSON or for a terminal, with the ids of the call that it belongs to."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from select import PIPE_BUF
from typing import Any, Literal, TextIO

import orjson

from service.turns import Turn

Format = Literal["auto", "json", "text"]

# What every line of a call carries. A line's own fields come as `extra={"fields": {...}}`.
CALL: ContextVar[Mapping[str, str]] = ContextVar("CALL", default={})  # noqa: B039  (nobody changes it)


def configure(level: str, form: Format) -> None:
    """Write the log to standard error; `auto` is JSON unless that is a terminal."""
    is_text = sys.stderr.isatty() if form == "auto" else form == "text"
    handler = Together()
    handler.setFormatter(Text("%(asctime)s %(levelname)-7s %(name)s: %(message)s") if is_text else Json())
    logging.basicConfig(level=level, handlers=[handler])
    # No line shows them, and to ask for them takes a third of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 - https://docs.python.org/3/howto/logging.html#optimization


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


class Json(logging.Formatter):
    """A JSON object a line."""

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
        return orjson.dumps(line, default=str).decode()


class Text(logging.Formatter):
    """A line to read, its fields behind the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {**CALL.get(), **getattr(record, "fields", {})}
