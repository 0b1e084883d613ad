"""Make hashes.csv with the libraries that write such hashes in other systems.

    python3 -m venv made
    made/bin/pip install libpass 'bcrypt<5' argon2-cffi django werkzeug cryptography
    made/bin/python tests/data/field/hashes.py > tests/data/field/hashes.csv

libpass is the maintained fork of passlib, under its name. bcrypt 5 refuses the long passwords that passlib
tries when it starts. Salts are random, so every run writes other hashes. Costs are low, to keep tests fast.
"""

import csv
import sys
from collections.abc import Iterator

import django
from argon2 import low_level
from django.conf import settings
from django.contrib.auth import hashers
from passlib import hash as passlib
from werkzeug.security import generate_password_hash

PASSWORDS = ("correct horse", "pässword ☃")


def from_passlib(password: str) -> Iterator[tuple[str, str]]:
    """Yield hashes of passlib, whose base64 has a dot for a plus, and those that it writes for LDAP."""
    for digest in ("sha1", "sha256", "sha512"):
        name = "pbkdf2_sha1" if digest == "sha1" else f"pbkdf2_{digest}"
        yield f"passlib {name}", getattr(passlib, name).using(rounds=1000).hash(password)
        yield f"passlib ldap_{name}", getattr(passlib, f"ldap_{name}").using(rounds=1000).hash(password)
    yield "passlib scrypt", passlib.scrypt.using(rounds=4).hash(password)
    for kind in ("ID", "I", "D"):
        argon2 = passlib.argon2.using(type=kind, time_cost=1, memory_cost=8, parallelism=1)
        yield f"passlib argon2 {kind}", argon2.hash(password)
    for ident in ("2a", "2b", "2y"):
        yield f"passlib bcrypt {ident}", passlib.bcrypt.using(rounds=4, ident=ident).hash(password)
        yield f"passlib ldap_bcrypt {ident}", passlib.ldap_bcrypt.using(rounds=4, ident=ident).hash(password)
    for version in (1, 2):
        sha256 = passlib.bcrypt_sha256.using(rounds=4, version=version)
        yield f"passlib bcrypt_sha256 version {version}", sha256.hash(password)


def from_django(password: str) -> Iterator[tuple[str, str]]:
    """Yield hashes of Django's hashers, with low costs."""
    for hasher in (hashers.PBKDF2PasswordHasher(), hashers.PBKDF2SHA1PasswordHasher()):
        yield f"Django {hasher.algorithm}", hasher.encode(password, hasher.salt(), iterations=1000)
    argon2 = hashers.Argon2PasswordHasher()
    argon2.time_cost, argon2.memory_cost, argon2.parallelism = 1, 8, 1
    bcrypt, bcrypt_sha256 = hashers.BCryptPasswordHasher(), hashers.BCryptSHA256PasswordHasher()
    bcrypt.rounds = bcrypt_sha256.rounds = 4
    for each in (argon2, bcrypt, bcrypt_sha256):
        yield f"Django {each.algorithm}", each.encode(password, each.salt())
    scrypt = hashers.ScryptPasswordHasher()
    yield "Django scrypt", scrypt.encode(password, scrypt.salt(), n=16)


def from_werkzeug(password: str) -> Iterator[tuple[str, str]]:
    """Yield hashes of Flask's library, which writes keys in hexadecimal."""
    for method in ("pbkdf2:sha1:1000", "pbkdf2:sha256:1000", "pbkdf2:sha512:1000", "scrypt:1024:8:1"):
        yield f"Werkzeug {method}", generate_password_hash(password, method)


def from_argon2(password: str) -> Iterator[tuple[str, str]]:
    """Yield hashes of argon2's version 1.0; its C library wrote no `v=` at that time."""
    for kind in (low_level.Type.ID, low_level.Type.I, low_level.Type.D):
        made = low_level.hash_secret(password.encode(), b"somesalt" * 2, 1, 8, 1, 32, kind, version=16)
        yield f"argon2 1.0 {kind.name}", made.decode()
        yield f"argon2 1.0 {kind.name} without v=", made.decode().replace("$v=16", "")


def main() -> None:
    """Write a line for each hash."""
    settings.configure()
    django.setup()
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(("made_by", "password", "hash"))
    for make in (from_passlib, from_django, from_werkzeug, from_argon2):
        for password in PASSWORDS:
            lines.writerows((made_by, password, made) for made_by, made in make(password))


if __name__ == "__main__":
    main()
