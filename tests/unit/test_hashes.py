"""Imported hashes: which are accepted, and that each verifies only its own password."""

from base64 import b64encode
from hashlib import pbkdf2_hmac, scrypt

import bcrypt
import pytest
from argon2 import PasswordHasher, Type

from service.users import hashes
from service.users.hashes import matches, password_hash_error

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


def test_verifies_hashes_of_other_programs() -> None:
    """An example of passlib's pbkdf2_sha256, and one of jBCrypt's tests."""
    passlib = "$pbkdf2-sha256$6400$.6UI/S.nXIk8jcbdHx3Fhg$98jZicV16ODfEsEZeYPGHU3kbrUrvUEXOPimVSQDD44"
    jbcrypt = "$2a$06$m0CrhHm10qJ3lXRY.5zDGO3rS2KdeeWLuGmsfGlMfOxih58VYVfxe"

    assert matches(passlib, "password") is True
    assert matches(jbcrypt, "a") is True


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
        ("scrypt", "ln=4", "ln=0"),
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

    monkeypatch.setattr(hashes, "pbkdf2_hmac", derive)
    key = encoded(pbkdf2_hmac("sha256", PASSWORD.encode(), SALT, 1000, 64))
    stored = f"$pbkdf2-sha256$1000${encoded(SALT)}${key}"

    assert matches(stored, PASSWORD) is True
    assert matches(stored, PASSWORD + " ") is False
    assert lengths == [32, 32]


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "password",
        "5f4dcc3b5aa765d61d8327deb882cf99",
        "$1$salt$qJH7.N4xYta3aEG/dfqo/0",
        "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQxMjM0NTY",
        "$argon2id$v=19$m=9999999999,t=3,p=4$c29tZXNhbHQxMjM0NTY$dGhpcyBpcyBub3QgYSBoYXNoIGF0IGFsbA",
        IMPORTED["argon2id"] + "\n",
        BCRYPT[:-1],
        BCRYPT.replace("$04$", "$03$"),
        IMPORTED["pbkdf2"].replace("pbkdf2", "pbkdf2-md5"),
    ],
)
def test_refuses_invalid_hashes(stored: str) -> None:
    """If one is stored all the same, no password is valid."""
    wrong = password_hash_error(stored)

    assert wrong
    assert "argon2, bcrypt, scrypt or pbkdf2" in wrong
    assert matches(stored, stored) is False


def test_hash_with_invalid_salt_verifies_no_password() -> None:
    """Its format alone does not show it."""
    assert matches("$pbkdf2-sha256$1$AAAAA$AAAAAAAAAAAAAAAAA", PASSWORD) is False
