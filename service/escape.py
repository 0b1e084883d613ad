"""Escapes untrusted text for people and line-based tools."""

import re

# Control, format (bidirectional among them), surrogate, private-use and unassigned characters, and all
# white space but the space. A character class can't name them, and `isprintable` is a table look-up.
UNPRINTABLE = re.compile(r"[^ -~]")
MAX_CHARACTERS = 16_384


def escape(text: str) -> str:
    r"""Return a text on one line, with unprintable characters escaped as in JSON: `\u001b`.

    A JSON document stays the same document.
    """
    return text if text.isprintable() else UNPRINTABLE.sub(_escape_character, text)


def shorten(text: str) -> str:
    """Return a text, truncated to MAX_CHARACTERS, with the number of missing characters at its end."""
    missing = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]}… ({missing:,} more characters)" if missing > 0 else text


def _escape_character(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable():
        return character
    # In JSON a character above U+FFFF is a pair of UTF-16 units; a lone surrogate is one.
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
