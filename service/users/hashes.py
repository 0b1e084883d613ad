"""Formats of password hashes: which are accepted, what each may cost to check, and how to check it."""

import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import pbkdf2_hmac, scrypt
from hmac import compare_digest

import bcrypt
from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

MAX_BCRYPT_BYTES = 72  # the algorithm ignores the rest; the library refuses it
SCRYPT_MEMORY_BYTES = 1 << 28  # for stored hashes; by default OpenSSL refuses more than 32 MiB
# A check at any of these limits takes about 1 s of one core (2.5 GHz), and can't be interrupted.
MAX_ARGON2_KIB = 1 << 18
MAX_ARGON2_KIB_PASSES = 1 << 20  # 0.98 s
MAX_ARGON2_LANES = 8
MAX_BCRYPT_COST = 14  # 0.94 s
MAX_SCRYPT_N_R = 1 << 20  # 128 bytes each
MAX_SCRYPT_N_R_P = 1 << 21  # 0.80 s
MAX_PBKDF2_ROUNDS = {None: 3_000_000, "sha256": 3_000_000, "sha512": 1_000_000}  # 0.66 s, 0.68 s, 0.64 s
PBKDF2_BLOCK_BYTES = {"sha1": 20, "sha256": 32, "sha512": 64}
SALT_AND_KEY = r"\$(?P<salt>[A-Za-z0-9./+]{2,128})\$(?P<key>[A-Za-z0-9./+]{16,128})"


@dataclass(frozen=True)
class HashFormat:
    """A hash format: its pattern, the limit of its costs, and how to check a password."""

    pattern: re.Pattern[str]
    is_affordable: Callable[[re.Match[str]], bool]
    limit: str
    matches: Callable[[re.Match[str], bytes], bool]


def _is_affordable_argon2(stored: re.Match[str]) -> bool:
    memory, passes, lanes = map(int, stored.group("m", "t", "p"))
    is_small = memory <= MAX_ARGON2_KIB and 1 <= lanes <= MAX_ARGON2_LANES
    return is_small and 1 <= memory * passes <= MAX_ARGON2_KIB_PASSES


def _is_affordable_bcrypt(stored: re.Match[str]) -> bool:
    return int(stored["cost"]) <= MAX_BCRYPT_COST


def _is_affordable_scrypt(stored: re.Match[str]) -> bool:
    log_n, r, p = map(int, stored.group("ln", "r", "p"))
    memory = r << log_n
    return log_n > 0 and memory <= MAX_SCRYPT_N_R and 1 <= memory * p <= MAX_SCRYPT_N_R_P


def _is_affordable_pbkdf2(stored: re.Match[str]) -> bool:
    return 1 <= int(stored["rounds"]) <= MAX_PBKDF2_ROUNDS[stored["digest"]]


def _matches_argon2(stored: re.Match[str], password: bytes) -> bool:
    try:
        return PasswordHasher().verify(stored[0], password)  # at the costs in the hash
    except VerificationError:
        return False


def _matches_bcrypt(stored: re.Match[str], password: bytes) -> bool:
    return bcrypt.checkpw(password[:MAX_BCRYPT_BYTES], stored[0].encode())


def _matches_scrypt(stored: re.Match[str], password: bytes) -> bool:
    costs = {"n": 1 << int(stored["ln"]), "r": int(stored["r"]), "p": int(stored["p"])}
    salt, key = _decode(stored["salt"]), _decode(stored["key"])
    return compare_digest(
        scrypt(password, salt=salt, dklen=len(key), maxmem=SCRYPT_MEMORY_BYTES, **costs), key
    )


def _matches_pbkdf2(stored: re.Match[str], password: bytes) -> bool:
    digest = stored["digest"] or "sha1"
    # The first block is as hard to guess as the whole key; each further one would cost all rounds again.
    key = _decode(stored["key"])[: PBKDF2_BLOCK_BYTES[digest]]
    derived = pbkdf2_hmac(digest, password, _decode(stored["salt"]), int(stored["rounds"]), len(key))
    return compare_digest(derived, key)


def _decode(text: str) -> bytes:
    # Without padding; passlib writes a dot where base64 has a plus.
    return b64decode(text.replace(".", "+") + "=" * (-len(text) % 4))


FORMATS = (
    HashFormat(
        re.compile(
            r"\$argon2(?:id|i|d)\$v=19\$m=(?P<m>\d{1,7}),t=(?P<t>\d{1,3}),p=(?P<p>\d{1,3})"
            r"\$[A-Za-z0-9+/]{11,128}\$[A-Za-z0-9+/]{16,128}"
        ),
        _is_affordable_argon2,
        "an argon2 hash with at most 256 MiB of memory, 1 GiB of memory times passes, and 8 lanes",
        _matches_argon2,
    ),
    HashFormat(
        re.compile(r"\$2[aby]\$(?P<cost>0[4-9]|[1-3]\d)\$[A-Za-z0-9./]{53}"),
        _is_affordable_bcrypt,
        "a bcrypt hash with a cost of at most 14",
        _matches_bcrypt,
    ),
    HashFormat(
        re.compile(r"\$scrypt\$ln=(?P<ln>\d{1,2}),r=(?P<r>\d{1,2}),p=(?P<p>\d{1,2})" + SALT_AND_KEY),
        _is_affordable_scrypt,
        "a scrypt hash with N*r of at most 2^20 (128 MiB) and N*r*p of at most 2^21",
        _matches_scrypt,
    ),
    HashFormat(
        re.compile(r"\$pbkdf2(?:-(?P<digest>sha256|sha512))?\$(?P<rounds>\d{1,8})" + SALT_AND_KEY),
        _is_affordable_pbkdf2,
        "a pbkdf2 hash with at most 3,000,000 rounds, or 1,000,000 with sha512",
        _matches_pbkdf2,
    ),
)

ADVICE = (
    "so that a check takes at most about a second; leave hashed_password out and have this user set a new "
    "password"
)


def matches(stored: str, password: str) -> bool:
    """Return whether a password matches a stored hash, at the costs in the hash; False for other text."""
    hash_format, match = _format_of(stored)
    try:
        return match is not None and hash_format.matches(match, password.encode())
    except ValueError:  # a salt that can't be decoded
        return False


def password_hash_error(value: str) -> str | None:
    """Return why an imported hash is not accepted: its format, or its cost; None if it is."""
    hash_format, match = _format_of(value)
    if not match:
        return "must be a hash by argon2, bcrypt, scrypt or pbkdf2, such as $argon2id$v=19$m=…"
    return None if hash_format.is_affordable(match) else f"must be {hash_format.limit}, {ADVICE}"


def _format_of(value: str) -> tuple[HashFormat, re.Match[str] | None]:
    found = ((hash_format, hash_format.pattern.fullmatch(value)) for hash_format in FORMATS)
    return next(((hash_format, match) for hash_format, match in found if match), (FORMATS[0], None))
