"""The log: one line an event, as JSON or for a terminal, with the ids of the call that it belongs to."""

import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

Format = Literal["auto", "json", "text"]

# What every line of a call carries. A line's own fields come as `extra={"fields": {...}}`.
CALL: ContextVar[Mapping[str, str]] = ContextVar("CALL", default={})  # noqa: B039  (nobody changes it)


def configure(level: str, form: Format) -> None:
    """Write the log to standard error; `auto` is JSON unless that is a terminal."""
    is_text = sys.stderr.isatty() if form == "auto" else form == "text"
    handler = logging.StreamHandler()
    handler.setFormatter(Text("%(asctime)s %(levelname)-7s %(name)s: %(message)s") if is_text else Json())
    logging.basicConfig(level=level, handlers=[handler])
    # No line shows them, and to ask for them takes a quarter of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


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
