"""Imported hashes: which are accepted, and that each verifies only its own password."""

import csv
import re
import string
from base64 import b64encode
from hashlib import pbkdf2_hmac, scrypt
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from argon2 import PasswordHasher, Type
from hypothesis import assume, given, settings, strategies as st

from service.bulk.convert import MAX_FAILURE_MESSAGE
from service.users import schemes
from service.users.hashes import are_acceptable_hashes, matches, password_hash_error
from service.users.schemes import BCRYPT_ALPHABET, HashError

PASSWORD = "correct horse"
LONG = "p" * 80
SALT = b"sixteen bytes ok"


def encoded(raw: bytes) -> str:
    return b64encode(raw).decode().rstrip("=")


def argon2(kind: Type) -> str:
    """Return the cheapest argon2 hash of a password."""
    return PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, type=kind).hash(PASSWORD, salt=SALT)


def pbkdf2(digest: str) -> str:
    return encoded(pbkdf2_hmac(digest, PASSWORD.encode(), SALT, 1000)).replace("+", ".")


BCRYPT = bcrypt.hashpw(PASSWORD.encode(), b"$2b$04$" + b"." * 22).decode()
SCRYPT = scrypt(PASSWORD.encode(), salt=SALT, n=1 << 4, r=8, p=1)
IMPORTED = {
    "argon2id": argon2(Type.ID),
    "argon2i": argon2(Type.I),
    "argon2d": argon2(Type.D),
    "bcrypt": BCRYPT,
    "bcrypt 2a": BCRYPT.replace("$2b$", "$2a$"),
    "bcrypt 2y": BCRYPT.replace("$2b$", "$2y$"),
    "scrypt": f"$scrypt$ln=4,r=8,p=1${encoded(SALT)}${encoded(SCRYPT)}",
    "pbkdf2": f"$pbkdf2$1000${encoded(SALT)}${pbkdf2('sha1')}",
    "pbkdf2-sha256": f"$pbkdf2-sha256$1000${encoded(SALT)}${pbkdf2('sha256')}",
    "pbkdf2-sha512": f"$pbkdf2-sha512$1000${encoded(SALT)}${pbkdf2('sha512')}",
}


@pytest.mark.parametrize("stored", IMPORTED.values(), ids=IMPORTED)
def test_imported_hash_verifies_its_password_only(stored: str) -> None:
    """No other password is valid."""
    assert password_hash_error(stored) is None
    assert matches(stored, PASSWORD) is True
    assert matches(stored, PASSWORD + " ") is False


# Both files say what made their hashes.
FIELD = Path(__file__).parents[1] / "data/field"


def field_hashes() -> list[tuple[str, str]]:
    """Return hashes of other systems, and their passwords."""
    found: list[tuple[str, str]] = []
    for name in ("hashes.csv", "hashes_published.csv"):
        with (FIELD / name).open(newline="") as lines:
            found += [(row["hash"], row["password"]) for row in csv.DictReader(lines)]
    return found


FIELD_HASHES = field_hashes()


@pytest.mark.parametrize(("stored", "password"), FIELD_HASHES)
def test_verifies_hashes_of_other_systems(stored: str, password: str) -> None:
    """As they are written by libraries, and as their makers publish them."""
    assert password_hash_error(stored) is None
    assert matches(stored, password) is True
    assert matches(stored, password[:-1]) is False


# From Spring's documentation, and from the test of its encoder with a secret.
SPRING = {
    "{pbkdf2}5d923b44a6d129f3ddf3e3c8d29412723dcbde72445e8ef6bf3b508fbf17fa4ed4d6b99ca763d8dc": b"",
    "ab1146a8458d4ce4e65789e5a3f60e423373cfa10b01abd23739e5ae2fdc37f8e9ede4ae6da65264": b"secret",
}


@pytest.mark.parametrize(("stored", "secret"), SPRING.items())
def test_guide_converts_pbkdf2_of_spring(stored: str, secret: bytes) -> None:
    """Its hashes do not say how they were made; the function in docs/security.md adds that."""
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from_spring" in block
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    converted = names["from_spring"](stored, secret=secret)

    assert password_hash_error(stored)
    assert password_hash_error(converted) is None
    assert matches(converted, "password") is True
    assert matches(converted, "password ") is False


def test_column_check_knows_the_forms_of_other_systems() -> None:
    """The others are checked row by row, which takes longer."""
    rows = [stored for stored, _ in FIELD_HASHES]
    slow = {stored for stored in rows if not are_acceptable_hashes([stored, None, stored])}

    assert {stored.split("$")[0].split(":")[0] or stored.split("$")[1] for stored in slow} == {
        "pbkdf2",  # of Werkzeug, and the next
        "scrypt",
        "bcrypt-sha256",
    }


LDAP_AND_DOVECOT = {
    "{BLF-CRYPT}": "bcrypt 2y",
    "{bcrypt}": "bcrypt",
    "{BCRYPT}": "bcrypt 2a",
    "{CRYPT}": "bcrypt 2y",
    "{crypt}": "bcrypt",
    "{ARGON2}": "argon2i",
    "{ARGON2ID}": "argon2id",
    "{argon2@SpringSecurity_v5_8}": "argon2id",
    "{scrypt}": "scrypt",
    "{PBKDF2}": "pbkdf2-sha256",
}


@pytest.mark.parametrize(("prefix", "form"), LDAP_AND_DOVECOT.items())
def test_prefix_in_braces_is_accepted(prefix: str, form: str) -> None:
    """Of Spring Security, LDAP servers and Dovecot; it must fit what follows it."""
    assert password_hash_error(prefix + IMPORTED[form]) is None
    assert matches(prefix + IMPORTED[form], PASSWORD) is True
    for wrong in (f"{prefix}{prefix}{IMPORTED[form]}", f"{{noop}}{IMPORTED[form]}", f"{prefix}secret"):
        assert password_hash_error(wrong)


SPELLINGS = {
    "padding": ("argon2id", encoded(SALT), encoded(SALT) + "=="),
    "alphabet of passlib": ("pbkdf2-sha256", ".", "+"),
    "alphabet of URLs": ("pbkdf2-sha512", "/", "_"),
    "order of argon2": ("argon2id", "m=8,t=1,p=1", "p=1,m=8,t=1"),
    "order of scrypt": ("scrypt", "ln=4,r=8,p=1", "r=8,p=1,ln=4"),
    "n of scrypt": ("scrypt", "ln=4", "n=16"),
    "N of scrypt": ("scrypt", "ln=4", "N=16"),
    "PHC": ("pbkdf2-sha256", "$1000$", "$i=1000$"),
    "PHC with length": ("pbkdf2-sha512", "$1000$", "$i=1000,l=64$"),
    "PHC in another order": ("pbkdf2", "$1000$", "$l=20,i=1000$"),
    "name of SHA-1": ("pbkdf2", "$pbkdf2$", "$pbkdf2-sha1$"),
}


@pytest.mark.parametrize(("form", "ours", "theirs"), SPELLINGS.values(), ids=SPELLINGS)
def test_spelling_of_a_hash_does_not_matter(form: str, ours: str, theirs: str) -> None:
    """Other systems write the same hash in other ways."""
    stored = IMPORTED[form].replace(ours, theirs)

    assert stored != IMPORTED[form]
    assert password_hash_error(stored) is None
    assert matches(stored, PASSWORD) is True
    assert matches(stored, PASSWORD + " ") is False


@settings(deadline=None)
@given(salt_bits=st.integers(0, 15), digest_bits=st.integers(0, 3))
def test_padding_bits_of_bcrypt_do_not_matter(salt_bits: int, digest_bits: int) -> None:
    """Four of the salt's last character and two of the digest's encode nothing."""
    letters = list(BCRYPT)
    for at, bits in ((28, salt_bits), (59, digest_bits)):
        letters[at] = BCRYPT_ALPHABET[BCRYPT_ALPHABET.index(letters[at]) + bits]
    stored = "".join(letters)

    assert password_hash_error(stored) is None
    assert matches(stored, PASSWORD) is True
    assert matches(stored, PASSWORD + " ") is False


def test_other_bits_of_bcrypt_matter() -> None:
    """The two bits of the salt's last character, and the four of the digest's."""
    for at, bit in ((28, 16), (28, 32), (59, 4), (59, 8), (59, 16), (59, 32)):
        changed = BCRYPT_ALPHABET[BCRYPT_ALPHABET.index(BCRYPT[at]) ^ bit]
        assert matches(BCRYPT[:at] + changed + BCRYPT[at + 1 :], PASSWORD) is False


def test_padding_bits_of_argon2_do_not_matter() -> None:
    """Its own library refuses them as an invalid encoding."""
    stored = argon2(Type.ID)
    salt = encoded(SALT)
    odd = salt[:-1] + string.ascii_letters[string.ascii_letters.index(salt[-1]) + 1]

    assert odd != salt
    assert matches(stored.replace(salt, odd), PASSWORD) is True


def test_argon2_without_a_version_is_version_1_0() -> None:
    """A hash of version 1.3 that lost its `v=` verifies nothing: it would be another function."""
    assert matches(argon2(Type.ID).replace("$v=19", ""), PASSWORD) is False


def test_bcrypt_uses_the_first_72_bytes() -> None:
    """As in the program that made the hash."""
    stored = bcrypt.hashpw(LONG[:72].encode(), bcrypt.gensalt(4)).decode()

    assert matches(stored, LONG) is True
    assert matches(stored, LONG[:71]) is False


@pytest.mark.parametrize(
    ("form", "cost", "too_much"),
    [
        ("argon2id", "m=8,", "m=262145,"),
        ("argon2id", "m=8,t=1,", "m=65536,t=17,"),
        ("argon2id", "m=8,t=1,", "m=262144,t=5,"),
        ("argon2id", "t=1", "t=0"),
        ("argon2id", "p=1", "p=9"),
        ("argon2id", "p=1", "p=0"),
        ("bcrypt", "$04$", "$15$"),
        ("scrypt", "ln=4", "ln=18"),
        ("scrypt", "ln=4,r=8", "ln=17,r=9"),
        ("scrypt", "ln=4,r=8,p=1", "ln=17,r=8,p=3"),
        ("scrypt", "p=1", "p=0"),
        ("pbkdf2", "$1000$", "$3000001$"),
        ("pbkdf2", "$1000$", "$0$"),
        ("pbkdf2-sha256", "$1000$", "$3000001$"),
        ("pbkdf2-sha512", "$1000$", "$1000001$"),
    ],
)
def test_refuses_hash_with_excessive_cost(form: str, cost: str, too_much: str) -> None:
    """A check must not occupy a thread for long; the error has the limit and the remedy."""
    wrong = password_hash_error(IMPORTED[form].replace(cost, too_much))

    assert wrong
    assert form.removesuffix("id").partition("-")[0] in wrong
    assert "at most" in wrong
    assert len(f"hashed_password {wrong}") <= MAX_FAILURE_MESSAGE
    assert "set a new password" in wrong


@pytest.mark.parametrize(
    ("form", "cost", "used_elsewhere"),
    [
        ("argon2id", "m=8,t=1,p=1", "m=65536,t=3,p=4"),  # argon2-cffi, and RFC 9106's second choice
        ("argon2id", "m=8,t=1,p=1", "m=102400,t=2,p=8"),  # Django, and argon2-cffi before version 21
        ("argon2id", "m=8,t=1,p=1", "m=262144,t=3,p=1"),  # libsodium, MODERATE
        ("argon2id", "m=8,t=1,p=1", "m=7168,t=5,p=1"),  # OWASP, Keycloak
        ("bcrypt", "$04$", "$14$"),
        ("scrypt", "ln=4", "ln=17"),  # OWASP
        ("scrypt", "ln=4,r=8,p=1", "ln=13,r=8,p=10"),  # OWASP, with less memory
        ("scrypt", "ln=4,r=8,p=1", "ln=15,r=8,p=3"),
        ("pbkdf2", "$1000$", "$1300000$"),  # OWASP
        ("pbkdf2-sha256", "$1000$", "$1200000$"),  # Django 6.0
        ("pbkdf2-sha256", "$1000$", "$600000$"),  # Keycloak, OWASP
        ("pbkdf2-sha512", "$1000$", "$210000$"),  # Keycloak, OWASP
    ],
)
def test_accepts_costs_of_other_systems(form: str, cost: str, used_elsewhere: str) -> None:
    """Their exports load unchanged."""
    assert cost in IMPORTED[form]
    assert password_hash_error(IMPORTED[form].replace(cost, used_elsewhere)) is None


def test_long_derived_key_costs_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """PBKDF2 runs all rounds for each block of the key; older releases of Keycloak store 64 bytes."""
    lengths = []

    def derive(digest: str, password: bytes, salt: bytes, rounds: int, length: int) -> bytes:
        lengths.append(length)
        return pbkdf2_hmac(digest, password, salt, rounds, length)

    monkeypatch.setattr(schemes, "pbkdf2_hmac", derive)
    key = encoded(pbkdf2_hmac("sha256", PASSWORD.encode(), SALT, 1000, 64))
    stored = f"$pbkdf2-sha256$1000${encoded(SALT)}${key}"

    assert matches(stored, PASSWORD) is True
    assert matches(stored, PASSWORD + " ") is False
    assert lengths == [32, 32]


FIRESCRYPT = next(stored for stored, _ in FIELD_HASHES if stored.startswith("$firescrypt$"))
REFUSED = {
    "": "is empty",
    "password": "no known scheme",
    "$unknown$x": "no known scheme",
    " " + BCRYPT: "spaces",
    BCRYPT + "\n": "line breaks",
    "5f4dcc3b5aa765d61d8327deb882cf99": "digest in hexadecimal",
    "$1$salt$qJH7.N4xYta3aEG/dfqo/0": "md5-crypt",
    "$6$rounds=5000$salt$" + "a" * 86: "sha512-crypt",
    "{CRYPT}$6$salt$" + "a" * 86: "sha512-crypt",
    "$5$salt$" + "a" * 43: "sha256-crypt",
    "$y$j9T$salt$hash": "yescrypt",
    "$2x$" + BCRYPT[4:]: "version 2x",
    "$2$" + BCRYPT[4:]: "version 2,",
    "$P$B" + "a" * 30: "phpass",
    "{SSHA}JFZFs0oHzxbMwkSJmYVeI8MnTDy/276a": "fast digest",
    "{noop}secret": "plain text",
    "{pbkdf2}5d923b44a6d129f3ddf3e3c8d29412723dcbde72445e8ef6": "does not say its rounds",
    "{pbkdf2@SpringSecurity_v5_8}62220177dcc48231c062c3af1a5afc42": "does not say its rounds",
    "{unknown}$2b$04$" + "a" * 53: "no known scheme",
    "{argon2}" + BCRYPT: "no such hash follows",
    "!AbCdEf": "disabled password",
    "sha1$salt$" + "a" * 40: "fast digest",
    "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQxMjM0NTY": "has 2 parts",
    "$argon2id$v=18$m=8,t=1,p=1$c29tZXNhbHQxMjM0NTY$dGhpcyBpcyBub3QgYSBoYXNo": "unknown version",
    IMPORTED["argon2id"].replace("t=1,", ""): "without the parameter t",
    IMPORTED["argon2id"].replace("t=1,", "t=1,t=1,"): "the parameter t twice",
    IMPORTED["argon2id"].replace("t=1,", "t=1,keyid=AAAA,"): "not known",
    IMPORTED["argon2id"].replace("m=8", "m=9999999999"): "its m has more than 7 digits",
    IMPORTED["argon2id"].replace("m=8", "m=7"): "at least 8",
    IMPORTED["argon2id"].replace("m=8,t=1,p=1", "m=16,t=1,p=8"): "at least 64",
    IMPORTED["argon2id"].replace("m=8", "m=-8"): "not a whole number",
    IMPORTED["argon2id"].replace("m=8", "m=\u0668"): "characters that no hash has",
    IMPORTED["argon2id"].replace(encoded(SALT), "c2FsdA"): "salt of 4 bytes; must be 8",
    IMPORTED["argon2id"] + "==": "padding is wrong",
    IMPORTED["argon2id"][:-1] + "*": "not base64",
    IMPORTED["argon2id"] + "AA": "not base64",
    BCRYPT[:-1]: "52 characters",
    BCRYPT.replace("$04$", "$03$"): "two digits from 04 to 31",
    BCRYPT.replace("$04$", "$4$"): "two digits from 04 to 31",
    BCRYPT[:-1] + "+": "characters other than",
    IMPORTED["pbkdf2"].replace("pbkdf2", "pbkdf2-md5"): "other than SHA-1 or SHA-2",
    IMPORTED["pbkdf2"].replace("$1000$", "$i=1000,l=32$"): "l=32, but a key of 20 bytes",
    IMPORTED["pbkdf2"].replace("$1000$", "$l=20$"): "without the parameter i",
    IMPORTED["pbkdf2"].replace("$1000$", "$$"): "number of rounds is not a whole number",
    IMPORTED["pbkdf2"].replace(encoded(SALT), ""): "salt of 0 bytes",
    "pbkdf2:sha256$salt$" + "a" * 64: "number of rounds is not a whole number",
    IMPORTED["scrypt"].replace("ln=4,", ""): "without the parameter ln",
    IMPORTED["scrypt"].replace("ln=4", "ln=0"): "not a power of two",
    IMPORTED["scrypt"].replace("ln=4", "ln=16385"): "not a power of two",
    IMPORTED["scrypt"].replace("ln=4,r=8", "ln=16,r=1"): "below 2^(16*r)",
    IMPORTED["scrypt"].replace("ln=4", "n=15"): "not a power of two",
    FIRESCRYPT.replace("$Bw==$", "$"): "has 4 parts",
    FIRESCRYPT.rpartition("$")[0] + "$" + encoded(b"k" * 32): "different lengths",
    "$pbkdf2-sha256$1000$" + "A" * 600 + "$" + "A" * 43: "longer than 512",
    "$pbkdf2-sha256$1000$" + "A" * 200 + "$" + "A" * 43: "salt of 150 bytes",
    "$pbkdf2-sha256$1$AAAAA$AAAAAAAAAAAAAAAA": "salt that is not base64",
}


@pytest.mark.parametrize(("stored", "why"), REFUSED.items())
def test_refuses_hashes_with_the_reason(stored: str, why: str) -> None:
    """The error names what is wrong, fits into a failure of a load, and repeats nothing of salt and key."""
    wrong = password_hash_error(stored)

    assert wrong
    assert why in wrong
    assert len(f"hashed_password {wrong}") <= MAX_FAILURE_MESSAGE
    assert are_acceptable_hashes([stored]) is False
    for part in stored.split("$")[-2:]:
        assert len(part) < 9 or part not in wrong


@pytest.mark.parametrize("stored", [text for text, why in REFUSED.items() if "at least" not in why])
def test_hash_that_can_not_be_read_is_an_error(stored: str) -> None:
    """It is not the same as a wrong password, so checking it returns neither."""
    with pytest.raises(HashError):
        matches(stored, PASSWORD)


def test_column_of_many_forms_is_judged_row_by_row() -> None:
    """One match covers a few forms at once; the answer does not depend on that."""
    few, many = ([f"$pbkdf2-sha256${rounds}$AAAA${'A' * 43}" for rounds in range(1, n)] for n in (8, 20))

    assert are_acceptable_hashes([*few, None] * 100) is True
    assert [password_hash_error(stored) for stored in many] == [None] * 19
    assert are_acceptable_hashes([*few, "$pbkdf2-sha256$0$AAAA$" + "A" * 43]) is False


def test_value_of_several_lines_is_no_column_of_hashes() -> None:
    """Each of its lines would be acceptable alone."""
    for form in ("bcrypt", "argon2id", "pbkdf2-sha256"):
        several = f"{IMPORTED[form]}\n{IMPORTED[form]}"
        assert password_hash_error(several)
        assert are_acceptable_hashes([several]) is False
        assert are_acceptable_hashes([IMPORTED[form], None, several]) is False


# Hashes, and pieces of which others are made.
PIECES = st.sampled_from([*IMPORTED.values(), *REFUSED, "=", "\n", "$", "A", ".", "\n$2b$04$", "é"])
COLUMNS = st.lists(st.one_of(st.none(), PIECES, st.lists(PIECES, max_size=3).map("".join)), max_size=6)


@settings(deadline=None, max_examples=500)
@given(column=COLUMNS)
def test_column_check_accepts_no_hash_that_the_rule_refuses(column: list[str | None]) -> None:
    """However hashes, damaged ones and separators are combined."""
    if are_acceptable_hashes(column):
        present = [value for value in column if value is not None]
        assert [password_hash_error(value) for value in present] == [None] * len(present)


@settings(deadline=None, max_examples=500)
@given(
    stored=st.sampled_from([stored for stored, _ in FIELD_HASHES] + list(IMPORTED.values())),
    changes=st.lists(st.tuples(st.integers(0, 120), st.sampled_from("+/._-=$,{A09é\n")), max_size=3),
)
def test_column_check_accepts_no_damaged_copy_that_the_rule_refuses(
    stored: str, changes: list[tuple[int, str]]
) -> None:
    """A copy is as long as the first hash, and differs from it in some characters."""
    copy = list(stored)
    for at, letter in changes:
        copy[at % len(copy)] = letter
    damaged = "".join(copy)
    if are_acceptable_hashes([stored, damaged, stored]):
        assert password_hash_error(damaged) is None


MOST_COSTS = 40  # characters of costs at the beginning of a hash


@settings(deadline=None, max_examples=300)
@given(
    stored=st.sampled_from(list(IMPORTED.values())),
    at=st.integers(0, 80),
    letter=st.characters(codec="ascii"),
)
def test_accepted_hash_can_be_checked(stored: str, at: int, letter: str) -> None:
    """Whatever one damaged character makes of it: no user is locked out by an import."""
    assume(not letter.isdigit() or at > MOST_COSTS)  # a higher cost would only take longer
    damaged = stored[:at] + letter + stored[at + 1 :]
    if password_hash_error(damaged) is None:
        assert matches(damaged, PASSWORD) in (True, False)
