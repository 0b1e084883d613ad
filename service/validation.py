"""The rules of single fields: what a value may be, and the sentence that says so.

A rule returns None for a good value, otherwise the end of a sentence that begins with the field's
name; it never echoes the value.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from service.db.base import MAX_ID
from service.errors import InvalidField, InvalidMask, TooLarge, Violation

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
MIN_SECONDS, MAX_SECONDS = -62_135_596_800, 253_402_300_799  # years 1 to 9999
MAX_NANOS = 999_999_999
MAX_IDS = 1000
MAX_PATHS = 100
MAX_BATCH = 1000
MAX_EMAIL = 255
MAX_MARKS = 30  # https://unicode.org/reports/tr15/#Stream_Safe_Text_Format
MAX_NAME = 255
MAX_LOAD_ID = 255
PRINTABLE = "must have printable characters only, and of white space only the space"
MAX_TITLE = 255
MAX_CONTENT_BYTES = 1 << 20
MAX_PASSWORD = 1024

EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
# Visible ASCII but for capitals, one a line.
PLAIN = r"[!-?\[-~]+@[!-?\[-~]+"
PLAIN_EMAILS = re.compile(rf"{PLAIN}(?:\n{PLAIN})*")


def normalise_email(email: str) -> str:
    """Return the one form in which an e-mail is stored, looked up and compared: NFC, trimmed, lower-case.

    One that is too long in any form comes back as it is.
    """
    trimmed = email.strip()
    if len(trimmed) > MAX_EMAIL and _is_too_long(trimmed):
        return trimmed
    return unicodedata.normalize("NFC", trimmed.lower())


def _is_too_long(email: str) -> bool:
    """Tell, without normalising it, that an e-mail is too long in NFC.

    NFC makes one character of four at most, and leaves most of a long run of combining marks; its time
    grows with the square of the run: 1.6 ms for 1,000 marks, minutes for a megabyte.
    """
    if len(email) > 4 * MAX_EMAIL:
        return True
    marks = 0
    for character in email:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MAX_MARKS:
            return True
    return False


def wrong_email(email: str) -> str | None:
    """Judge a normalised e-mail."""
    if not email:
        return "is required"
    if len(email) > MAX_EMAIL:
        return f"is longer than {MAX_EMAIL} characters"
    if "\0" in email or not EMAIL.fullmatch(email):
        return "must be one name, one @ and one domain, without spaces"
    return None


def are_plain_emails(emails: Sequence[str]) -> bool:
    """Tell whether all are valid and normalised already, as nearly all are; one look instead of thousands."""
    joined = "\n".join(emails)
    return PLAIN_EMAILS.fullmatch(joined) is not None and len(max(emails, key=len)) <= MAX_EMAIL


def are_texts(values: Iterable[str | None], longest: int = MAX_NAME) -> bool:
    """Tell whether all keep to the rules of a text with so many characters."""
    given = [value for value in values if value]
    return not given or (len(max(given, key=len)) <= longest and "\0" not in "".join(given))


def wrong_full_name(name: str) -> str | None:
    return _wrong_text(name, MAX_NAME)


def wrong_title(title: str) -> str | None:
    return _wrong_text(title, MAX_TITLE) if title else "is required: 1 to 255 characters"


def wrong_content(content: str) -> str | None:
    if "\0" in content:
        return "must not contain NUL"
    # A character has at most 4 bytes, so most contents need no encoding.
    if len(content) * 4 > MAX_CONTENT_BYTES and len(content.encode()) > MAX_CONTENT_BYTES:
        return f"is larger than {MAX_CONTENT_BYTES:,} bytes"
    return None


def wrong_password(password: str) -> str | None:
    return _wrong_text(password, MAX_PASSWORD) if password else "is required: 1 to 1,024 characters"


def wrong_id(number: int) -> str | None:
    return None if 1 <= number <= MAX_ID else f"must be from 1 to {MAX_ID}"


def wrong_version(version: int) -> str | None:
    return None if version >= 0 else "must be 0, or the version last read"


def _wrong_text(value: str, longest: int) -> str | None:
    if len(value) > longest:
        return f"is longer than {longest:,} characters"
    return "must not contain NUL" if "\0" in value else None


class Violations(list[Violation]):
    """Everything wrong with one request, gathered before any of it is told."""

    def add(self, field: str, wrong: str | None) -> None:
        """Note the verdict of a rule on a field."""
        if wrong:
            self.append(Violation(field, f"{field} {wrong}"))


@contextmanager
def checking() -> Iterator[Violations]:
    """Raise InvalidField at the end of the block if it added violations."""
    violations = Violations()
    yield violations
    if violations:
        raise InvalidField.of(violations)


def check_id(number: int, field: str = "id") -> int:
    """Return an id; raises InvalidField."""
    with checking() as violations:
        violations.add(field, wrong_id(number))
    return number


def check_ids(ids: Sequence[int]) -> list[int]:
    """Return the ids of a batch, each once, in the order asked; raises InvalidField, TooLarge."""
    if len(ids) > MAX_IDS:
        raise TooLarge(f"ids has more than {MAX_IDS:,} entries; ask in several calls", field="ids")
    with checking() as violations:
        for position, number in enumerate(ids):
            if wrong := wrong_id(number):
                violations.add(f"ids[{position}]", wrong)
        if not ids:
            violations.add("ids", f"is required: 1 to {MAX_IDS:,} ids")
    return list(dict.fromkeys(ids))


def check_version(version: int, field: str = "version") -> int:
    """Return the version to check against, 0 for none; raises InvalidField."""
    with checking() as violations:
        violations.add(field, wrong_version(version))
    return version


def check_load_id(text: str, field: str = "load_id") -> str:
    """Return a load's name; raises InvalidField."""
    with checking() as violations:
        violations.add(field, _wrong_text(text, MAX_LOAD_ID) if text else "is required")
    return text


def check_new_load_id(text: str, field: str = "load_id") -> None:
    """Judge the name of a load that begins; raises InvalidField.

    Loads that began before there was this rule can still be resumed, shown and aborted.
    """
    with checking() as violations:
        # Neither control, format, surrogate, private-use and unassigned characters, nor line separators.
        violations.add(field, None if text.isprintable() else PRINTABLE)


def check_request_id(text: str) -> UUID | None:
    """Return the request's id, None where there is none; raises InvalidField."""
    if not text:
        return None
    try:
        return UUID(text)
    except ValueError:
        with checking() as violations:
            violations.add("request_id", "must be a UUID such as 7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10")
        return None


def is_set(message: Message, field: str) -> bool:
    """Tell whether a field was given; a text without presence counts as not given where it is empty."""
    if message.DESCRIPTOR.fields_by_name[field].has_presence:
        return message.HasField(field)
    return bool(getattr(message, field))


def masked_fields(message: Message, mask: FieldMask, writable: Collection[str]) -> list[str]:
    """Return the fields that an update writes: those of the mask, without one those that are set.

    Raises InvalidMask for a path that can't be written, and where nothing would be.
    """
    if not mask.paths:
        return [field for field in writable if is_set(message, field)]
    return mask_paths(mask, writable)


def mask_paths(mask: FieldMask, writable: Collection[str], field: str = "update_mask") -> list[str]:
    """Return the fields that a mask names, `*` for every one that can be written; raises InvalidMask."""
    if len(mask.paths) > MAX_PATHS:
        raise InvalidMask(f"{field} has more than {MAX_PATHS} paths; name each field once", field=field)
    if list(mask.paths) == ["*"]:
        return list(writable)
    for path in mask.paths:
        if path not in writable:
            raise InvalidMask(
                f"{field} has a path that can't be written; it may name {', '.join(writable)}", field=field
            )
    return list(dict.fromkeys(mask.paths))


def wrong_timestamp(moment: Timestamp) -> str | None:
    is_valid = MIN_SECONDS <= moment.seconds <= MAX_SECONDS and 0 <= moment.nanos <= MAX_NANOS
    return None if is_valid else "must be in the years 1 to 9999, with nanos from 0 to 999,999,999"


def datetime_from(moment: Timestamp) -> datetime:
    """Return a valid Timestamp as a time; what is finer than a microsecond is cut off."""
    return EPOCH + timedelta(seconds=moment.seconds, microseconds=moment.nanos // 1000)


def timestamp(moment: datetime | int) -> Any:
    """Return a time, or its microseconds since 1970, as the fields of a Timestamp."""
    since = moment if isinstance(moment, int) else (moment - EPOCH) // MICROSECOND
    seconds, microseconds = divmod(since, 1_000_000)
    return {"seconds": seconds, "nanos": microseconds * 1000}


def check_choice(number: int, enum: Any, field: str) -> None:
    """Raise InvalidField for a number that the enum doesn't have."""
    if number not in enum.values():
        raise InvalidField(f"{field} must be one of {', '.join(enum.keys())}", field=field)


def check_export(after_id: int, batch_size: int) -> int:
    """Return the rows in a message of an export: 1000 for 0; raises InvalidField."""
    with checking() as violations:
        violations.add("after_id", None if 0 <= after_id <= MAX_ID else f"must be from 0 to {MAX_ID}")
        violations.add(
            "batch_size", None if 0 <= batch_size <= MAX_BATCH else f"must be from 1 to {MAX_BATCH}"
        )
    return batch_size or MAX_BATCH
