"""Escaping of text from elsewhere, before it is written where people or line-based tools read it."""

import re

# Control, format (bidirectional among them), surrogate, private-use and unassigned characters, and all
# white space but the space. A character class can't name them, and `isprintable` is a table look-up.
UNPRINTABLE = re.compile(r"[^ -~]")
MAX_CHARACTERS = 16_384


def escape(text: str) -> str:
    r"""Return a text on one line, each character that is not printable as JSON escapes it: `\u001b`.

    A JSON document stays the same document.
    """
    return text if text.isprintable() else UNPRINTABLE.sub(_escape_character, text)


def shorten(text: str) -> str:
    """Return a text, cut after MAX_CHARACTERS; the end then says how many are missing."""
    missing = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]}… ({missing:,} more characters)" if missing > 0 else text


def _escape_character(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable():
        return character
    # Above U+FFFF JSON has two units; a lone surrogate is one.
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
