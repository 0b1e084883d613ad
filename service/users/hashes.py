"""The forms of password hashes: which are taken, what each may cost to check, and how that is done."""

import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import pbkdf2_hmac, scrypt
from hmac import compare_digest

import bcrypt
from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

MAX_BCRYPT_BYTES = 72  # bcrypt itself passes over the rest; the library refuses it
MAX_SCRYPT_MEMORY = 1 << 28
SALT_AND_KEY = r"\$(?P<salt>[A-Za-z0-9./+]{2,128})\$(?P<key>[A-Za-z0-9./+]{16,128})"


@dataclass(frozen=True)
class Form:
    """A form of hashes: its pattern, the most that the costs in it may be, and how a password is checked."""

    pattern: re.Pattern[str]
    most: Mapping[str, int]
    limit: str
    matches: Callable[[re.Match[str], bytes], bool]


def _matches_argon2(stored: re.Match[str], password: bytes) -> bool:
    try:
        return PasswordHasher().verify(stored[0], password)  # at the costs that the hash names
    except VerificationError:
        return False


def _matches_bcrypt(stored: re.Match[str], password: bytes) -> bool:
    return bcrypt.checkpw(password[:MAX_BCRYPT_BYTES], stored[0].encode())


def _matches_scrypt(stored: re.Match[str], password: bytes) -> bool:
    costs = {"n": 1 << int(stored["ln"]), "r": int(stored["r"]), "p": int(stored["p"])}
    salt, key = _decoded(stored["salt"]), _decoded(stored["key"])
    return compare_digest(scrypt(password, salt=salt, dklen=len(key), maxmem=MAX_SCRYPT_MEMORY, **costs), key)


def _matches_pbkdf2(stored: re.Match[str], password: bytes) -> bool:
    salt, key = _decoded(stored["salt"]), _decoded(stored["key"])
    derived = pbkdf2_hmac(stored["digest"] or "sha1", password, salt, int(stored["rounds"]), len(key))
    return compare_digest(derived, key)


def _decoded(text: str) -> bytes:
    # Without padding; passlib writes a dot where base64 has a plus.
    return b64decode(text.replace(".", "+") + "=" * (-len(text) % 4))


# At its cap a check takes a few seconds and 256 MiB.
FORMS = (
    Form(
        re.compile(
            r"\$argon2(?:id|i|d)\$v=19\$m=(?P<m>\d{1,7}),t=(?P<t>\d{1,3}),p=(?P<p>\d{1,3})"
            r"\$[A-Za-z0-9+/]{11,128}\$[A-Za-z0-9+/]{16,128}"
        ),
        {"m": 1 << 18, "t": 16, "p": 16},
        "an argon2 hash that costs at most 256 MiB of memory, 16 passes and 16 lanes",
        _matches_argon2,
    ),
    Form(
        re.compile(r"\$2[aby]\$(?P<cost>0[4-9]|[1-3]\d)\$[A-Za-z0-9./]{53}"),
        {"cost": 15},
        "a bcrypt hash with a cost of at most 15",
        _matches_bcrypt,
    ),
    Form(
        re.compile(r"\$scrypt\$ln=(?P<ln>\d{1,2}),r=(?P<r>\d{1,2}),p=(?P<p>\d{1,2})" + SALT_AND_KEY),
        {"ln": 17, "r": 8, "p": 10},
        "a scrypt hash with at most ln=17, r=8 and p=10",
        _matches_scrypt,
    ),
    Form(
        re.compile(r"\$pbkdf2(?:-(?P<digest>sha256|sha512))?\$(?P<rounds>\d{1,8})" + SALT_AND_KEY),
        {"rounds": 5_000_000},
        "a pbkdf2 hash of at most 5,000,000 rounds",
        _matches_pbkdf2,
    ),
)


def matches(stored: str, password: str) -> bool:
    """Tell whether a password is a hash's, at the cost that the hash names; False for what is no hash."""
    form, match = _form_of(stored)
    try:
        return match is not None and form.matches(match, password.encode())
    except ValueError:  # a salt that can't be decoded
        return False


def wrong_password_hash(value: str) -> str | None:
    """Judge a hash from elsewhere by its form and by what it costs to check."""
    form, match = _form_of(value)
    if not match:
        return "must be a hash by argon2, bcrypt, scrypt or pbkdf2, such as $argon2id$v=19$m=…"
    is_affordable = all(1 <= int(match[name]) <= most for name, most in form.most.items())
    return None if is_affordable else f"must be {form.limit}"


def _form_of(value: str) -> tuple[Form, re.Match[str] | None]:
    found = ((form, form.pattern.fullmatch(value)) for form in FORMS)
    return next(((form, match) for form, match in found if match), (FORMS[0], None))
