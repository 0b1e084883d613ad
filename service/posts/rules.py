"""The rules of a post's fields."""

from service.validation import Rule, id_error, text_error

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


# The fields that a request may write. An update can't write `author_id`.
RULES: dict[str, Rule] = {"title": title_error, "content": content_error}
CREATE_RULES: dict[str, Rule] = {"author_id": id_error, **RULES}
