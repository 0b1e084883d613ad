"""Texts of callers in the log and on terminals: each stays on its line, and can be read back."""

import io
import json
import logging
import re
import sys
from typing import Any

import pytest
from hypothesis import given, strategies as st

from service import logs
from service.escape import MAX_CHARACTERS, escape
from service.logs import CALL_IDS, drop_values
from tests.support.log_lines import parse

# Surrogates included. Two lone ones next to each other are one character in JSON.
TEXT = st.text(
    st.characters() | st.sampled_from('\n\r\t\x1b\x7f\x85\x9b\u2028\u2029\u202e\u2066" =\\{')
).filter(lambda text: not re.search("[\ud800-\udbff][\udc00-\udfff]", text))
FORGED = "ada\n2026-01-01 00:00:00,000 INFO    roster.audit: forged"


def format_record(formatter: logging.Formatter, message: str, *arguments: object, **fields: Any) -> str:
    """Return the lines of a record."""
    record = logging.LogRecord(
        "service.test", logging.INFO, "", 0, message, arguments, sys.exc_info() if sys.exception() else None
    )
    record.fields = fields
    return formatter.format(record)


def text() -> logs.Text:
    return logs.Text("%(levelname)s %(name)s: %(message)s")


def read(line: str) -> tuple[str, dict[str, Any]]:
    """Return the message and the fields of a line of text."""
    return parse(line.removeprefix("INFO service.test: "))


@given(message=TEXT, first=TEXT, second=TEXT)
def test_text_line_can_be_read_back(message: str, first: str, second: str) -> None:
    """It is one printable line, whatever the message and the fields have."""
    line = format_record(text(), "%s", message, first=first, second=second, counts={first: 1})

    assert line.isprintable()
    assert read(line) == (message, {"first": first, "second": second, "counts": {first: 1}})


@given(message=TEXT, field=TEXT)
def test_json_line_can_be_read_back(message: str, field: str) -> None:
    """It is one printable line too, because people read JSON on terminals."""
    line = format_record(logs.Json(), "%s", message, field=field)

    assert line.isprintable()
    found = json.loads(line)
    assert (found["message"], found["field"]) == (message, field)


@given(TEXT)
def test_escaped_text_is_printable_and_keeps_json(document: str) -> None:
    """Printable characters are unchanged, and so is the value of a JSON document."""
    assert escape(document).isprintable()
    assert json.loads(escape(json.dumps(document, ensure_ascii=False))) == document
    assert escape("Ada Löveläce, 日本 \\n 🙂") == "Ada Löveläce, 日本 \\n 🙂"


@given(first=TEXT, second=TEXT)
def test_only_first_line_of_exception_looks_like_event(first: str, second: str) -> None:
    """The others are indented; line breaks in the exception's text are escaped."""
    try:
        try:
            raise ValueError(first)  # noqa: TRY301
        except ValueError as error:
            error.add_note(f"{FORGED}\n{second}")
            raise ExceptionGroup(second, [error, KeyError(first)]) from error
    except ExceptionGroup:
        head, *lines = format_record(text(), "failed").split("\n")

    assert head == "INFO service.test: failed"
    assert all(line.startswith("  ") and line.isprintable() for line in lines)


def test_exception_text_is_one_line_of_its_traceback() -> None:
    """Its line breaks add no lines."""
    try:
        raise ValueError('first\n  File "forged.py", line 1\nlast')  # noqa: TRY301
    except ValueError:
        lines = format_record(text(), "failed").splitlines()

    assert lines[-1] == '  ValueError: first\\u000a  File "forged.py", line 1\\u000alast'
    assert lines[1] == "  Traceback (most recent call last):"


@pytest.mark.parametrize("formatter", [text(), logs.Json()])
def test_length_of_log_lines_is_limited(formatter: logging.Formatter) -> None:
    """Truncated texts are marked."""
    line = format_record(formatter, "m" * 1_000_000, field="f" * 1_000_000)

    assert len(line) < 3 * MAX_CHARACTERS
    assert line.count("(983,616 more characters)") == 2


@pytest.mark.parametrize("formatter", [text(), logs.Json()])
def test_values_outside_json_are_logged(formatter: logging.Formatter) -> None:
    """Lone surrogates and large integers."""
    line = format_record(formatter, "message", field="\udcff", number=1 << 70, counts={1: 2})

    assert "\\udcff" in line
    assert str(1 << 70) in line


def write_failure(name: str, message: str, *arguments: object) -> str:
    """Return the line of a record of a library that logs the current exception."""
    record = logging.LogRecord(name, logging.ERROR, "", 0, message, arguments, sys.exc_info())
    assert drop_values(record)
    return text().format(record)


@pytest.mark.parametrize(
    ("logger", "message", "kept"),
    [
        ("grpc._cython.cygrpc", "Invalid encoding on %s", "Invalid encoding on …"),
        ("asyncio", "Exception in callback f(b'secret')\nhandle: <Handle f(b'secret')>", "callback f"),
    ],
)
def test_lines_of_libraries_have_no_values(logger: str, message: str, kept: str) -> None:
    """The place in the code stays; values and exception texts are removed."""
    try:
        b"\xffsecret".decode()
    except UnicodeDecodeError:
        line = write_failure(logger, message, *[b"secret"] * message.count("%"))

    assert kept in line.splitlines()[0]
    assert "test_escape.py" in line
    assert "UnicodeDecodeError" in line
    assert "secret" not in line.replace('"secret".decode', "").replace("\\xffsecret", "")


def test_unwritable_line_shows_no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library's handler would print them."""
    stream = io.StringIO()
    handler = logs.BufferedStreamHandler()
    handler.setStream(stream)
    handler.setFormatter(text())
    handler.handle(logging.LogRecord("service.test", logging.INFO, "", 0, "%d", ("secret",), None))

    assert stream.getvalue() == "a line of the logger service.test could not be written\n"


def test_ids_of_a_call_are_escaped() -> None:
    """Wherever they come from."""
    token = CALL_IDS.set({"request_id": FORGED})
    try:
        assert read(format_record(text(), "call"))[1] == {"request_id": FORGED}
    finally:
        CALL_IDS.reset(token)
