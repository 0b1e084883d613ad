"""Lines of the text log, read back as docs/operating.md describes them."""

import json
import re
from typing import Any

FIELD = re.compile(r" (\w+)=")
END = re.compile(" ")


def parse(line: str) -> tuple[str, dict[str, Any]]:
    """Return the message and the fields of a line, without the parts before the message."""
    message, line = _value(line, FIELD)
    fields = {}
    while line:
        name = FIELD.match(line)
        assert name, line
        fields[name[1]], line = _value(line[name.end() :], END)
    return message, fields


def _value(line: str, end: re.Pattern[str]) -> tuple[Any, str]:
    if line.startswith(('"', "{", "[")):
        value, length = json.JSONDecoder().raw_decode(line)
        return value, line[length:]
    place = end.search(line)
    length = place.start() if place else len(line)
    return line[:length], line[length:]
