"""Formats of password hashes: reads the texts that other systems store.

The reader of a scheme gets the fields between the dollar signs. No error repeats a salt, a key or any other
part of a text: the text could be a password in the wrong column.
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from hmac import digest as hmac_digest

from service.users.schemes import (
    ADVICE,
    ARGON2_1_0,
    ARGON2_1_3,
    PBKDF2_BLOCK_BYTES,
    Argon2Hash,
    BcryptHash,
    FirebaseScryptHash,
    HashError,
    PasswordHash,
    Pbkdf2Hash,
    ScryptHash,
)

MAX_HASH = 512
MIN_SALT_BYTES, MIN_KEY_BYTES = 1, 12
MIN_ARGON2_SALT_BYTES = 8
MAX_DECODED_BYTES = 96
# Stored costs above these limits would occupy a thread for hours, or all memory.
MAX_DIGITS = {"m": 7, "t": 3, "p": 3, "r": 3}
MAX_OTHER_DIGITS = 8
MAX_LOG2_N = 63  # a larger `ln` is N itself
SHAPES_AT_ONCE = 8  # in a column; further ones are checked row by row

ACCEPTED = "argon2, bcrypt, scrypt or pbkdf2"
BCRYPT_CHARACTERS = 53  # of salt and digest
BCRYPT_TEXT = re.compile(rf"[./A-Za-z0-9]{{{BCRYPT_CHARACTERS}}}")
BCRYPT_COST = re.compile(r"0[4-9]|[12]\d|3[01]")
PREFIX = re.compile(r"\{([A-Za-z0-9-]{1,20})(?:@SpringSecurity_v5_8)?\}")
HEX = re.compile(r"(?:[0-9A-Fa-f]{2})+")
SPRING_COSTS = re.compile(r"[0-9a-f]{5,6}")
# passlib writes a dot where base64 has a plus; the alphabet for URLs has two characters of its own.
TO_BASE64 = str.maketrans("._-", "+/+")

# The common forms. Whether such a text is accepted depends on its beginning and its lengths, not on the
# characters of salt and key; in a column of migrated hashes, nearly all have those in common.
BASE64_CHARACTER = "[A-Za-z0-9+/._-]"  # as `_decode` accepts them, apart from padding
BRACES = r"(?:\{[A-Za-z0-9-]{1,20}(?:@SpringSecurity_v5_8)?\})?"
STARTS = (
    rf"{BRACES}(?:argon2)?\$argon2(?:id|i|d)\$(?:v=\d+\$)?[a-z0-9=,]+\$",
    rf"{BRACES}\$(?:fire)?scrypt\$[a-z0-9=,]+\$",
    rf"{BRACES}\$pbkdf2(?:-sha\d+)?\$[a-z0-9=,]+\$",
    r"\{PBKDF2(?:-SHA\d+)?\}\d+\$",
    r"pbkdf2_sha\d+\$\d+\$",
    r"\{scrypt(?:@SpringSecurity_v5_8)?\}\$[0-9a-f]+\$",
)
SALTED = re.compile(
    rf"(?P<start>{'|'.join(STARTS)})(?P<salt>{BASE64_CHARACTER}+)(?P<pad>=*\$)"
    rf"(?P<key>{BASE64_CHARACTER}+)"
    # After the hash, Firebase's form has the separator and the signer key of the project.
    rf"(?P<end>=*(?:\${BASE64_CHARACTER}{{1,16}}=*\${BASE64_CHARACTER}{{1,128}}=*)?)"
)
BCRYPT = re.compile(rf"(?P<start>{BRACES}(?:bcrypt(?:_sha256)?\$)?\$2[aby]\$\d\d\$){BCRYPT_TEXT.pattern}")
# Tables that map these characters to one of them, and others to themselves.
BASE64_KINDS = re.sub(BASE64_CHARACTER.encode(), b"A", bytes(range(256)))
BCRYPT_KINDS = re.sub(rb"[./A-Za-z0-9]", b"A", bytes(range(256)))

# Schemes that can't be checked, by the beginning of a hash.
UNSUPPORTED = {
    r"\$1\$|\$md5-crypt\$|\{MD5-CRYPT\}": "md5-crypt",
    r"\$apr1\$": "Apache's md5-crypt",
    r"\$5\$|\$sha256-crypt\$|\{SHA256-CRYPT\}": "sha256-crypt",
    r"\$6\$|\$sha512-crypt\$|\{SHA512-CRYPT\}": "sha512-crypt",
    r"\$g?y\$": "yescrypt",
    r"\$7\$": "scrypt in the form of crypt(3)",
    r"\$2\$": "bcrypt of version 2, from before 2a",
    r"\$2x\$": "bcrypt of version 2x, made by a faulty crypt_blowfish",
    r"\$[PH]\$": "phpass",
    r"\$S\$": "Drupal's sha512",
    r"\$wp\$": "WordPress's bcrypt of an HMAC",
    r"\$3\$|\$NT\$": "NTLM",
    r"\$(?:md5|sha1|sha256|sha512)\$|(?:md5|sha1|sha256|sha512|unsalted_\w+)\$": "one round of a fast digest",
    r"\$hmac-\w+\$|hmac:": "one round of HMAC",
    r"\{S?(?:SHA|MD5|MD4)[-\d]*\}(?:.*)|\{SSHA\d*\}|\{SMD5\}": "one round of a fast digest",
    r"\{(?:noop|plain|cleartext|clear)\}": "a password in plain text",
    r"\{ldap\}": "a digest of LDAP",
    r"SCRAM-SHA-\d+\$": "SCRAM",
    r"\$pbkdf2-\w+\$|pbkdf2_\w+\$|pbkdf2:\w+:": "pbkdf2 with a digest other than SHA-1 or SHA-2",
    r"AQAAAA": "ASP.NET's pbkdf2 in one base64 text",
    r"[!*]": "the mark of a disabled password",
    r"[0-9a-f]{32,128}\Z": "a digest in hexadecimal, without a scheme, a salt and costs",
}
UNSUPPORTED_SCHEMES = tuple(UNSUPPORTED.values())
UNSUPPORTED_START = re.compile("|".join(f"({start})" for start in UNSUPPORTED), re.IGNORECASE)


def read_hash(text: str) -> PasswordHash:
    """Return the hash in a text, whatever a check costs; raises HashError for one that can't be checked."""
    if len(text) > MAX_HASH:
        raise HashError(f"is longer than {MAX_HASH} characters")
    if " " in text or not text.isascii() or not text.isprintable():
        raise HashError("contains characters that no hash has, such as spaces or line breaks")
    if text.startswith("{"):
        text = _without_prefix(text)
    scheme, *fields = text.removeprefix("$").split("$")
    readers = READERS if text.startswith("$") else DJANGO_READERS
    scheme, *costs = scheme.split(":")
    if (reader := readers.get(scheme)) is None:
        raise HashError(_unsupported(text))
    return reader([":".join(costs), *fields] if costs else fields)


def password_hash_error(value: str) -> str | None:
    """Return why an imported hash is not accepted: its format, or its cost; None if it is.

    Nearly all hashes have one of two forms, and the answer is the same for all of the same costs and lengths.
    """
    if len(value) > MAX_HASH:
        return _error(value)
    if found := BCRYPT.fullmatch(value):
        return _error_of_shape(found["start"], BCRYPT_CHARACTERS)
    if found := SALTED.fullmatch(value):
        start, salt, pad, key, end = found.groups()
        return _error_of_shape(start, len(salt), pad, len(key), end)
    return _error(value)


@lru_cache(1024)
def _error_of_shape(start: str, first: int, middle: str = "", second: int = 0, end: str = "") -> str | None:
    """Return the error of all hashes with these costs, and with this many characters of salt and key."""
    return _error(f"{start}{'A' * first}{middle}{'A' * second}{end}")


def _error(value: str) -> str | None:
    try:
        return read_hash(value).cost_error()
    except HashError as error:
        return str(error)


def matches(stored: str, password: str) -> bool:
    """Return whether a password matches a stored hash; raises HashError if it can't be checked."""
    return read_hash(stored).verify(password.encode())


def are_acceptable_hashes(values: Sequence[str | None]) -> bool:
    """Return whether `password_hash_error` surely accepts every value that is not None.

    Migrated hashes have few shapes: the same scheme, costs and lengths. The rule for one value judges the
    first hash of each shape, and one match finds all others of it: ten times as fast as one by one.
    """
    present = [value for value in values if value is not None]
    joined = "\n".join(present) + "\n"
    if not present:
        return True
    if _are_alike(joined, present[0], len(present)):
        return password_hash_error(present[0]) is None
    if joined.count("\n") != len(present):  # a value contains a line break
        return False
    shapes: frozenset[str] = frozenset()
    position, end = 0, len(joined)
    while position < end and len(shapes) < SHAPES_AT_ONCE:
        first = joined[position : joined.index("\n", position)]
        shape = _shape(first)
        if shape is None or password_hash_error(first):
            return False
        shapes |= {shape}
        found = _lines_of(shapes).match(joined, position)
        if found is None:
            return False
        position = found.end()
    return position >= end


def _are_alike(joined: str, first: str, count: int) -> bool:
    """Return whether all lines begin like the first, and have characters of the same kinds in all places.

    In the common forms they are all as acceptable as the first then. This finds what a match would find for
    a single shape, in half the time.
    """
    if found := BCRYPT.fullmatch(first):
        kinds = BCRYPT_KINDS
    elif found := SALTED.fullmatch(first):
        kinds = BASE64_KINDS
    else:
        return False
    line = f"{first}\n".encode().translate(kinds)
    is_alike = joined.isascii() and joined.encode().translate(kinds) == line * count
    return is_alike and joined.count("\n" + found["start"]) == count - 1


def _shape(text: str) -> str | None:
    """Return a pattern of hashes that are as acceptable as this one; None for a form that is rare."""
    if found := BCRYPT.fullmatch(text):
        return re.escape(found["start"]) + BCRYPT_TEXT.pattern
    if not (found := SALTED.fullmatch(text)):
        return None
    salt, key = (f"{BASE64_CHARACTER}{{{len(found[name])}}}" for name in ("salt", "key"))
    return re.escape(found["start"]) + salt + re.escape(found["pad"]) + key + re.escape(found["end"])


@lru_cache(64)
def _lines_of(shapes: frozenset[str]) -> re.Pattern[str]:
    return re.compile(rf"(?:(?:{'|'.join(sorted(shapes))})\n)++")


def _without_prefix(text: str) -> str:
    """Return a hash without the scheme in braces that Spring Security, Dovecot and LDAP write before it."""
    found = PREFIX.match(text)
    if found is None or (scheme := PREFIXES.get(found[1].lower())) is None:
        raise HashError(_unsupported(text))
    rest = text[found.end() :]
    if scheme.startswith("$pbkdf2") and not rest.startswith("$pbkdf2"):
        if "$" not in rest:
            raise HashError(
                "is Spring's pbkdf2, which does not say its rounds; "
                "write it as $pbkdf2-sha256$i=ROUNDS$salt$key, see docs/security.md"
            )
        return f"{scheme}${rest.removeprefix('$')}"
    if scheme == "$scrypt" and not rest.startswith("$scrypt$"):
        return f"$spring-scrypt{rest}"
    if not rest.startswith(scheme):
        raise HashError(f"has the prefix {{{found[1].lower()}}}, but no such hash follows it")
    return rest


PREFIXES = {
    "bcrypt": "$2",
    "blf-crypt": "$2",
    "crypt": "$",
    "argon2": "$argon2",
    "argon2d": "$argon2d$",
    "argon2i": "$argon2i$",
    "argon2id": "$argon2id$",
    "scrypt": "$scrypt",
    "pbkdf2": "$pbkdf2",
    "pbkdf2-sha1": "$pbkdf2-sha1",
    "pbkdf2-sha256": "$pbkdf2-sha256",
    "pbkdf2-sha512": "$pbkdf2-sha512",
}


def _argon2(kind: str, fields: Sequence[str]) -> Argon2Hash:
    version = ARGON2_1_0  # the C library wrote no version before 1.3
    if fields and fields[0].startswith("v="):
        version = _parameters("argon2", fields[0], ["v"])["v"]
        fields = fields[1:]
    if version not in (ARGON2_1_0, ARGON2_1_3):
        raise HashError("is argon2 of an unknown version; must be v=19 or v=16")
    costs, salt, key = _fields(fields, f"${kind}$v=19$m=…,t=…,p=…$salt$key", 3)
    numbers = _parameters("argon2", costs, ["m", "t", "p"])
    return Argon2Hash(
        kind,
        version,
        numbers["m"],
        numbers["t"],
        numbers["p"],
        _decode("argon2", "salt", salt, MIN_ARGON2_SALT_BYTES),
        _decode("argon2", "key", key, MIN_KEY_BYTES),
    )


def _bcrypt(version: str, fields: Sequence[str]) -> BcryptHash:
    cost, text = _fields(fields, f"${version}$cost$salt-and-digest", 2)
    if not BCRYPT_COST.fullmatch(cost):
        raise HashError("is bcrypt with a cost that is not two digits from 04 to 31")
    return BcryptHash(version, int(cost), _bcrypt_text(text))


def _bcrypt_text(text: str) -> str:
    if len(text) != BCRYPT_CHARACTERS:
        count = BCRYPT_CHARACTERS
        raise HashError(f"is bcrypt with {len(text)} characters of salt and digest; must be {count}")
    if not BCRYPT_TEXT.fullmatch(text):
        raise HashError("is bcrypt with a salt or digest that contains characters other than ./A-Za-z0-9")
    return text


def _passlib_bcrypt_sha256(fields: Sequence[str]) -> BcryptHash:
    form = "$bcrypt-sha256$v=2,t=2b,r=12$salt$digest"
    costs, salt, digest = _fields(fields, form, 3)
    found = re.fullmatch(r"v=2,t=(2[ab]),r=([1-9]\d?)|(2[ab]),(\d\d?)", costs)
    if not found:
        raise HashError(f"is bcrypt-sha256 with unknown parameters; must be {form}")
    if found[1]:
        prepare = partial(_hmac_sha256, _bcrypt_text(salt + digest)[:22].encode())
        return BcryptHash(found[1], int(found[2]), salt + digest, prepare)
    return BcryptHash(found[3], int(found[4]), _bcrypt_text(salt + digest), _sha256_base64)


def _hmac_sha256(salt: bytes, password: bytes) -> bytes:
    return b64encode(hmac_digest(salt, password, "sha256"))


def _sha256_base64(password: bytes) -> bytes:
    return b64encode(sha256(password).digest())


def _sha256_hex(password: bytes) -> bytes:
    return sha256(password).hexdigest().encode()


def _scrypt(fields: Sequence[str]) -> ScryptHash:
    costs, salt, key = _fields(fields, "$scrypt$ln=…,r=…,p=…$salt$key", 3)
    return _scrypt_hash(_scrypt_costs(costs), _decode("scrypt", "salt", salt), _decode("scrypt", "key", key))


def _scrypt_costs(text: str) -> tuple[int, int, int]:
    name = "n" if text.lower().startswith("n=") or ",n=" in text.lower() else "ln"
    numbers = _parameters("scrypt", text.replace("N=", "n="), [name, "r", "p"])
    n = numbers[name]
    # The base-2 logarithm of N; some programs, Ory Kratos among them, write N itself under this name.
    if name == "ln" and n <= MAX_LOG2_N:
        n = 1 << n
    return n, numbers["r"], numbers["p"]


def _scrypt_hash(costs: tuple[int, int, int], salt: bytes, key: bytes) -> ScryptHash:
    return ScryptHash(*costs, salt, _long_enough("scrypt", "key", key, MIN_KEY_BYTES))


def _spring_scrypt(fields: Sequence[str]) -> ScryptHash:
    costs, salt, key = _fields(fields, "{scrypt}$costs$salt$key", 3)
    if not SPRING_COSTS.fullmatch(costs):
        raise HashError("is Spring's scrypt with costs that are not 5 or 6 hexadecimal digits")
    number = int(costs, 16)
    unpacked = (1 << (number >> 16), number >> 8 & 0xFF, number & 0xFF)
    return _scrypt_hash(unpacked, _decode("scrypt", "salt", salt), _decode("scrypt", "key", key))


def _firebase(fields: Sequence[str]) -> FirebaseScryptHash:
    form = "$firescrypt$ln=…,r=…,p=1$salt$hash$separator$signer-key"
    costs, salt, key, separator, signer = _fields(fields, form, 5)
    salted = _decode("firescrypt", "salt", salt) + _decode("firescrypt", "salt separator", separator, 0)
    signer_key = _decode("firescrypt", "signer key", signer, MIN_KEY_BYTES)
    encrypted = _decode("firescrypt", "hash", key, MIN_KEY_BYTES)
    if len(encrypted) != len(signer_key):
        raise HashError("is firescrypt with a hash and a signer key of different lengths")
    return FirebaseScryptHash(_scrypt_hash(_scrypt_costs(costs), salted, encrypted), signer_key)


def _pbkdf2(digest: str, fields: Sequence[str]) -> Pbkdf2Hash:
    scheme = f"pbkdf2-{digest}"
    costs, salt, key = _fields(fields, f"${scheme}$i=…,l=…$salt$key", 3)
    numbers = {"i": 0}
    if "=" in costs:
        numbers = _parameters(scheme, costs, ["i"], optional="l")
    else:
        numbers["i"] = _number(scheme, "number of rounds", costs)
    decoded = _decode(scheme, "key", key, MIN_KEY_BYTES)
    if numbers.get("l", len(decoded)) != len(decoded):
        raise HashError(f"is {scheme} with l={numbers['l']:,}, but a key of {len(decoded)} bytes")
    return Pbkdf2Hash(digest, numbers["i"], _decode(scheme, "salt", salt), decoded)


def _django_pbkdf2(digest: str, fields: Sequence[str]) -> Pbkdf2Hash:
    rounds, salt, key = _fields(fields, f"pbkdf2_{digest}$rounds$salt$key", 3)
    scheme = f"Django's pbkdf2-{digest}"
    number = _number(scheme, "number of rounds", rounds)
    return Pbkdf2Hash(digest, number, _text_salt(scheme, salt), _decode(scheme, "key", key, MIN_KEY_BYTES))


def _django_scrypt(fields: Sequence[str]) -> ScryptHash:
    if ":" in "".join(fields[:1]):
        return _werkzeug_scrypt(fields)
    n, salt, r, p, key = _fields(fields, "scrypt$N$salt$r$p$key", 5)
    return _scrypt_hash(
        _plain_costs([n, r, p]), _text_salt("Django's scrypt", salt), _decode("scrypt", "key", key)
    )


def _werkzeug_scrypt(fields: Sequence[str]) -> ScryptHash:
    form = "scrypt:N:r:p$salt$key"
    costs, salt, key = _fields(fields, form, 3)
    numbers = costs.split(":")
    if len(numbers) != len("Nrp"):
        raise HashError(f"is Werkzeug's scrypt without its three costs; must be {form}")
    return _scrypt_hash(_plain_costs(numbers), _text_salt("scrypt", salt), _hex("scrypt", key))


def _plain_costs(texts: Sequence[str]) -> tuple[int, int, int]:
    n, r, p = (_number("scrypt", name, text) for name, text in zip(("N", "r", "p"), texts, strict=True))
    return n, r, p


def _werkzeug_pbkdf2(fields: Sequence[str]) -> Pbkdf2Hash:
    costs, salt, key = _fields(fields, "pbkdf2:sha256:rounds$salt$key", 3)
    digest, _, rounds = costs.partition(":")
    if digest not in PBKDF2_BLOCK_BYTES:
        raise HashError("is pbkdf2 with a digest other than SHA-1 or SHA-2")
    number = _number(f"pbkdf2-{digest}", "number of rounds", rounds)
    return Pbkdf2Hash(digest, number, _text_salt("pbkdf2", salt), _hex("pbkdf2", key))


def _django_argon2(fields: Sequence[str]) -> Argon2Hash:
    kind = fields[0] if fields else ""
    if kind not in ("argon2id", "argon2i", "argon2d"):
        raise HashError("is Django's argon2 without an argon2 hash")
    return _argon2(kind, fields[1:])


def _django_bcrypt(fields: Sequence[str], prepare: Callable[[bytes], bytes] | None = None) -> BcryptHash:
    empty, version, *rest = _fields(fields, "bcrypt$$2b$cost$salt-and-digest", 4)
    if empty or version not in ("2a", "2b", "2y"):
        raise HashError("is Django's bcrypt without a bcrypt hash of version 2a, 2b or 2y")
    read = _bcrypt(version, rest)
    if prepare is None:
        return read
    return BcryptHash(version, read.cost, read.salt_and_digest, prepare)


Reader = Callable[[Sequence[str]], PasswordHash]
READERS: Mapping[str, Reader] = {
    **{kind: partial(_argon2, kind) for kind in ("argon2id", "argon2i", "argon2d")},
    **{version: partial(_bcrypt, version) for version in ("2a", "2b", "2y")},
    **{f"pbkdf2-{digest}": partial(_pbkdf2, digest) for digest in PBKDF2_BLOCK_BYTES},
    "pbkdf2": partial(_pbkdf2, "sha1"),
    "scrypt": _scrypt,
    "spring-scrypt": _spring_scrypt,
    "firescrypt": _firebase,
    "bcrypt-sha256": _passlib_bcrypt_sha256,
}
# Without a dollar sign before the scheme: of Django and Werkzeug.
DJANGO_READERS: Mapping[str, Reader] = {
    **{f"pbkdf2_{digest}": partial(_django_pbkdf2, digest) for digest in PBKDF2_BLOCK_BYTES},
    "pbkdf2": _werkzeug_pbkdf2,
    "scrypt": _django_scrypt,
    "argon2": _django_argon2,
    "bcrypt": _django_bcrypt,
    "bcrypt_sha256": partial(_django_bcrypt, prepare=_sha256_hex),
}


def _unsupported(text: str) -> str:
    if (found := UNSUPPORTED_START.match(text)) and found.lastindex:
        name = UNSUPPORTED_SCHEMES[found.lastindex - 1]
        return f"is {name}, which is not accepted; must be {ACCEPTED}, or {ADVICE}"
    if not text:
        return f"is empty; must be a hash by {ACCEPTED}, such as $argon2id$v=19$m=…"
    return f"is of no known scheme; must be a hash by {ACCEPTED}, such as $argon2id$v=19$m=…"


def _fields(fields: Sequence[str], form: str, count: int) -> Sequence[str]:
    if len(fields) != count:
        raise HashError(f"has {len(fields)} parts after its scheme, not {count}; must be {form}")
    return fields


def _parameters(scheme: str, text: str, required: Sequence[str], optional: str = "") -> dict[str, int]:
    """Return the numbers of `name=number,…`, in any order."""
    numbers: dict[str, int] = {}
    for pair in text.split(","):
        name, _, number = pair.partition("=")
        if name not in (*required, optional):
            names = ", ".join(required)
            raise HashError(f"is {scheme} with a parameter that is not known; its parameters are {names}")
        if name in numbers:
            raise HashError(f"is {scheme} with the parameter {name} twice")
        numbers[name] = _number(scheme, name, number)
    if missing := [name for name in required if name not in numbers]:
        raise HashError(f"is {scheme} without the parameter {missing[0]}")
    return numbers


def _number(scheme: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise HashError(f"is {scheme}, but its {name} is not a whole number")
    digits = MAX_DIGITS.get(name, MAX_OTHER_DIGITS)
    if len(text) > digits:
        raise HashError(f"is {scheme}, but its {name} has more than {digits} digits; {ADVICE}")
    return int(text)


def _decode(scheme: str, what: str, text: str, least: int = MIN_SALT_BYTES) -> bytes:
    """Return the bytes of a text in base64, with or without padding, in any of its alphabets."""
    padded = text.translate(TO_BASE64)
    bare = padded.rstrip("=")
    if bare != padded and len(padded) % 4:
        raise HashError(f"is {scheme} with a {what} whose padding is wrong")
    try:
        data = b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except ValueError:
        raise HashError(f"is {scheme} with a {what} that is not base64") from None
    return _long_enough(scheme, what, data, least)


def _hex(scheme: str, text: str) -> bytes:
    if not HEX.fullmatch(text):
        raise HashError(f"is {scheme} with a key that is not hexadecimal")
    return _long_enough(scheme, "key", bytes.fromhex(text), MIN_KEY_BYTES)


def _text_salt(scheme: str, text: str) -> bytes:
    """Return the salt of Django and Werkzeug, which hash its characters."""
    return _long_enough(scheme, "salt", text.encode(), MIN_SALT_BYTES)


def _long_enough(scheme: str, what: str, data: bytes, least: int) -> bytes:
    if not least <= len(data) <= MAX_DECODED_BYTES:
        raise HashError(
            f"is {scheme} with a {what} of {len(data)} bytes; must be {least} to {MAX_DECODED_BYTES} bytes"
        )
    return data
