"""The rules of a user's fields."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from service.users.characters import invisible_error, mixed_scripts_error
from service.users.domains import ACE, ascii_domain, domain_error, normalise_domain
from service.users.hashes import are_acceptable_hashes, password_hash_error
from service.validation import Rule, text_error, text_rule

MAX_EMAIL = 255
MAX_COMBINING_MARKS = 30  # https://unicode.org/reports/tr15/#Stream_Safe_Text_Format
MAX_PASSWORD = 1024

EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
# A name in quotes, and one that doesn't need them: https://www.rfc-editor.org/rfc/rfc5321#section-4.1.2
QUOTED_NAME = re.compile(r'"(?:\\.|[^"\\])*"')
NEEDLESSLY_QUOTED = re.compile(r'"([^\s"(),:;<>@\[\\\]]+)"')
ROOT_DOT = re.compile(r"(?<=[^.\s])\.\Z")  # after the last label of a domain
# Outside of quotes these separate addresses, or an address from what is not part of it.
SPECIALS = re.compile(r'["(),:;<>\[\\\]]')
# Visible ASCII without capitals and specials, with its labels; one e-mail in each line.
ATOM = r"[!#-'*+\-./0-9=?^-~]"
LABEL = r"[!#-'*+\-/0-9=?^-~]{1,63}+"
PLAIN = rf"{ATOM}++@{LABEL}(?:\.{LABEL})*+"
PLAIN_EMAIL = re.compile(PLAIN)
PLAIN_EMAILS = re.compile(rf"{PLAIN}(?:\n{PLAIN})*+")


def normalise_email(email: str) -> str:
    """Return an e-mail as it is stored and compared: trimmed, in lower case, in NFC, its domain in Unicode.

    A dot at the end of the domain, and quotes that the name doesn't need, are removed. An e-mail that is too
    long in any form is only trimmed.
    """
    part = normalise_email_part(email)
    if len(part) > MAX_EMAIL:  # it may not be in its normal form
        return part
    name, at, domain = part.rpartition("@")
    quoted = NEEDLESSLY_QUOTED.fullmatch(name)
    if quoted and at:
        name = quoted[1]
    return f"{name}{at}{ROOT_DOT.sub('', domain)}"


def normalise_email_part(part: str) -> str:
    """Return a part of an e-mail as it would be in the normal form of the whole."""
    trimmed = part.strip()
    if len(trimmed) > MAX_EMAIL and _is_too_long(trimmed):
        return trimmed
    name, at, domain = trimmed.rpartition("@")
    if not at:
        name, domain = domain, ""
    return f"{unicodedata.normalize('NFC', name.lower())}{at}{normalise_domain(domain)}"


def email_spellings(email: str) -> list[str]:
    """Return the texts under which a user with this e-mail may be stored, the normal form first.

    Earlier releases stored an e-mail trimmed, in lower case and in NFC, whatever its domain.
    """
    normal = normalise_email(email)
    if len(normal) > MAX_EMAIL:
        return [normal]
    earlier = unicodedata.normalize("NFC", email.strip().lower())
    return list(dict.fromkeys([normal, earlier, *other_spellings(normal)]))


def other_spellings(email: str) -> list[str]:
    """Return the texts under which an earlier release may have stored a normalised e-mail."""
    name, at, domain = email.rpartition("@")
    return [] if domain.isascii() else [f"{name}{at}{ascii_domain(domain)}"]


def stored_spellings(emails: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each other text under which an earlier release may have stored a normalised e-mail, with that."""
    if "".join(emails).isascii():
        return
    for email in emails:
        for spelling in other_spellings(email):
            yield spelling, email


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
    """Check a normalised e-mail that is to be stored."""
    if len(email) <= MAX_EMAIL and PLAIN_EMAIL.fullmatch(email):
        return None
    error = email_key_error(email) or invisible_error(email)
    if error:
        return error
    name, _, domain = email.partition("@")
    return _name_error(name) or _domain_error(domain) or mixed_scripts_error(email)


def email_key_error(email: str) -> str | None:
    """Check a normalised e-mail to look up: earlier releases stored some that `email_error` refuses."""
    if not email:
        return "is required"
    if len(email) > MAX_EMAIL:
        return f"is longer than {MAX_EMAIL} characters"
    if "\0" in email or not EMAIL.fullmatch(email):
        return "must be one name, one @ and one domain, without spaces"
    return None


def _name_error(name: str) -> str | None:
    return None if QUOTED_NAME.fullmatch(name) else _special_error(name)


def _domain_error(domain: str) -> str | None:
    is_literal = domain.startswith("[")
    return (None if is_literal else _special_error(domain)) or domain_error(domain)


def _special_error(part: str) -> str | None:
    special = SPECIALS.search(part)
    if special is None:
        return None
    return f"must be one address alone, without the character U+{ord(special[0]):04X} ({special[0]})"


def are_plain_emails(emails: Sequence[str | None]) -> bool:
    """Return whether all e-mails that are not None are valid and need no normalisation.

    That holds for nearly all batches, and one match is faster than thousands.
    """
    present = [email for email in emails if email is not None]
    if not present:
        return True
    joined = "\n".join(present)
    if joined.count("\n") != len(present) - 1:  # an e-mail contains a line break
        return False
    if ACE in joined:
        return False
    return PLAIN_EMAILS.fullmatch(joined) is not None and len(max(present, key=len)) <= MAX_EMAIL


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
