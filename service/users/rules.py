"""The rules of a user's fields."""

import re
import unicodedata
from collections.abc import Sequence

from service.users.hashes import are_acceptable_hashes, password_hash_error
from service.validation import Rule, text_error, text_rule

MAX_EMAIL = 255
MAX_COMBINING_MARKS = 30  # https://unicode.org/reports/tr15/#Stream_Safe_Text_Format
MAX_PASSWORD = 1024

EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
# Visible ASCII without capitals, one e-mail in each line.
PLAIN = r"[!-?\[-~]+@[!-?\[-~]+"
PLAIN_EMAILS = re.compile(rf"{PLAIN}(?:\n{PLAIN})*")


def normalise_email(email: str) -> str:
    """Return an e-mail as it is stored and compared: trimmed, in lower case, in NFC.

    An e-mail that is too long in any form is only trimmed.
    """
    trimmed = email.strip()
    if len(trimmed) > MAX_EMAIL and _is_too_long(trimmed):
        return trimmed
    return unicodedata.normalize("NFC", trimmed.lower())


def _is_too_long(email: str) -> bool:
    """Return whether an e-mail is certainly too long in NFC, without normalising it.

    NFC composes at most four characters into one, and keeps most of a long run of combining marks. Its time
    grows with the square of such a run: 1.6 ms for 1,000 marks, minutes for a megabyte.
    """
    if len(email) > 4 * MAX_EMAIL:
        return True
    marks = 0
    for character in email:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MAX_COMBINING_MARKS:
            return True
    return False


def email_error(email: str) -> str | None:
    """Check a normalised e-mail."""
    if not email:
        return "is required"
    if len(email) > MAX_EMAIL:
        return f"is longer than {MAX_EMAIL} characters"
    if "\0" in email or not EMAIL.fullmatch(email):
        return "must be one name, one @ and one domain, without spaces"
    return None


def are_plain_emails(emails: Sequence[str]) -> bool:
    """Return whether all e-mails are valid and need no normalisation.

    That holds for nearly all batches, and one match is faster than thousands.
    """
    joined = "\n".join(emails)
    if joined.count("\n") != len(emails) - 1:  # an e-mail contains a line break
        return False
    return PLAIN_EMAILS.fullmatch(joined) is not None and len(max(emails, key=len)) <= MAX_EMAIL


def password_error(password: str) -> str | None:
    return text_error(password, MAX_PASSWORD) if password else "is required: 1 to 1,024 characters"


# Texts that may be null, and the largest number of their characters.
OPTIONAL_TEXTS = {
    "full_name": 255,
}

# The fields that a request may write. E-mails are normalised first. `is_active` has no rule but its type.
RULES = {
    "email": Rule(email_error, are_plain_emails),
    **{field: text_rule(max_length) for field, max_length in OPTIONAL_TEXTS.items()},
    "is_active": Rule(lambda _: None, lambda _: True),
    "password": Rule(password_error),
    "hashed_password": Rule(password_hash_error, are_acceptable_hashes),
}
