"""The rules of a post's fields."""

from collections.abc import Sequence

from service.validation import Rule, are_valid_texts, id_error, text_error

MAX_TITLE = 255
MAX_CONTENT_BYTES = 1 << 20


def title_error(title: str) -> str | None:
    return text_error(title, MAX_TITLE) if title else "is required: 1 to 255 characters"


def content_error(content: str) -> str | None:
    if "\0" in content:
        return "must not contain NUL"
    # A character has at most 4 bytes, so most contents need not be encoded.
    if len(content) * 4 > MAX_CONTENT_BYTES and len(content.encode()) > MAX_CONTENT_BYTES:
        return f"is larger than {MAX_CONTENT_BYTES:,} bytes"
    return None


def are_valid_titles(titles: Sequence[str]) -> bool:
    return "" not in titles and are_valid_texts(titles, MAX_TITLE)


def are_short_contents(contents: Sequence[str]) -> bool:
    # A character has at most 4 bytes.
    return are_valid_texts(contents, MAX_CONTENT_BYTES // 4)


# The fields that a request may write. An update can't write `author_id`.
RULES = {
    "title": Rule(title_error, are_valid_titles),
    "content": Rule(content_error, are_short_contents),
}
CREATE_RULES = {"author_id": Rule(id_error), **RULES}
