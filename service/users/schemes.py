"""Password hashing schemes: what a check may cost, and how to check a password.

`hashes.py` reads these from the texts that other systems store. No error repeats a salt or a key.
"""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import pbkdf2_hmac, scrypt
from hmac import compare_digest
from typing import Protocol

import bcrypt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, VerifyMismatchError

MAX_BCRYPT_BYTES = 72  # the algorithm ignores the rest; the library refuses it
SCRYPT_MEMORY_BYTES = 1 << 28  # for stored hashes; by default OpenSSL refuses more than 32 MiB
# A check at any of these limits takes about 1 s of one core (2.5 GHz), and can't be interrupted.
MAX_ARGON2_KIB = 1 << 18
MAX_ARGON2_KIB_PASSES = 1 << 20  # 0.98 s
MAX_ARGON2_LANES = 8
MAX_BCRYPT_COST = 14  # 0.94 s
MAX_SCRYPT_N_R = 1 << 20  # 128 bytes each
MAX_SCRYPT_N_R_P = 1 << 21  # 0.80 s
# 0.66 s with SHA-1, 0.68 s with SHA-256, 0.64 s with SHA-512.
MAX_PBKDF2_ROUNDS = {
    "sha1": 3_000_000,
    "sha224": 3_000_000,
    "sha256": 3_000_000,
    "sha384": 1_000_000,
    "sha512": 1_000_000,
}
PBKDF2_BLOCK_BYTES = {"sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64}

ARGON2_1_0, ARGON2_1_3 = 16, 19  # as `v=` writes them
MIN_ARGON2_LANE_KIB = 8
BCRYPT_ALPHABET = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
BCRYPT_SALT_CHARACTERS = 22
# The last character of a salt has 2 bits of it and 4 of padding, that of a digest 4 and 2.
SALT_BITS, DIGEST_BITS = 0b110000, 0b111100
AES_KEY_BYTES = 32
ADVICE = "leave it out and have this user set a new password"


class HashError(ValueError):
    """A hash can't be checked. The message ends a sentence that begins with the name of its field."""


class PasswordHash(Protocol):
    """A hash of one scheme, with its costs."""

    def cost_error(self) -> str | None:
        """Return why a check costs too much, or is impossible at these costs; otherwise None."""

    def verify(self, password: bytes) -> bool:
        """Return whether a password matches; raises HashError if the library can't check the hash."""


@dataclass(frozen=True, slots=True)
class Argon2Hash:
    """Argon2, RFC 9106, and its version 1.0 from before the RFC."""

    kind: str
    version: int
    memory: int  # KiB
    passes: int
    lanes: int
    salt: bytes
    key: bytes

    def cost_error(self) -> str | None:
        if error := _range_error("argon2", "lanes", self.lanes, MAX_ARGON2_LANES):
            return error
        least = MIN_ARGON2_LANE_KIB * self.lanes
        if error := _range_error("argon2", "KiB of memory", self.memory, MAX_ARGON2_KIB, least):
            return error
        product = self.memory * self.passes
        return _range_error("argon2", "KiB of memory times passes", product, MAX_ARGON2_KIB_PASSES)

    def verify(self, password: bytes) -> bool:
        costs = f"m={self.memory},t={self.passes},p={self.lanes}"
        canonical = f"${self.kind}$v={self.version}${costs}${_base64(self.salt)}${_base64(self.key)}"
        try:
            return PasswordHasher().verify(canonical, password)  # at the costs in the hash
        except VerifyMismatchError:
            return False
        except Argon2Error as error:
            raise HashError(f"can't be checked by the argon2 library: {error}") from None


def _itself(password: bytes) -> bytes:
    return password


@dataclass(frozen=True, slots=True)
class BcryptHash:
    """Bcrypt; `prepare` derives what it hashes from the password, for schemes that are built on it."""

    version: str
    cost: int
    salt_and_digest: str
    prepare: Callable[[bytes], bytes] = _itself

    def cost_error(self) -> str | None:
        return _range_error("bcrypt", "as its cost", self.cost, MAX_BCRYPT_COST, 4)

    def verify(self, password: bytes) -> bool:
        """Return whether a password matches; bits that only pad the salt or the digest do not matter.

        Some programs wrote random ones. They can't affect what was hashed, so crypt(3) of OpenBSD writes
        zeros; the library refuses others in a salt, and finds others in a digest unequal.
        """
        salt = self.salt_and_digest[:BCRYPT_SALT_CHARACTERS]
        digest = self.salt_and_digest[BCRYPT_SALT_CHARACTERS:]
        text = f"${self.version}${self.cost:02}${_without(salt, SALT_BITS)}{_without(digest, DIGEST_BITS)}"
        try:
            return bcrypt.checkpw(self.prepare(password)[:MAX_BCRYPT_BYTES], text.encode())
        except ValueError as error:
            raise HashError(f"can't be checked by the bcrypt library: {error}") from None


@dataclass(frozen=True, slots=True)
class ScryptHash:
    """Scrypt, RFC 7914."""

    n: int
    r: int
    p: int
    salt: bytes
    key: bytes

    def cost_error(self) -> str | None:
        memory = self.n * self.r
        is_power = self.n > 1 and self.n & (self.n - 1) == 0
        if not is_power or self.n.bit_length() > 16 * self.r:
            return "is scrypt with an N that is not a power of two from 2 to below 2^(16*r)"
        if error := _range_error("scrypt", "as N*r", memory, MAX_SCRYPT_N_R):
            return error
        return _range_error("scrypt", "as N*r*p", memory * self.p, MAX_SCRYPT_N_R_P)

    def verify(self, password: bytes) -> bool:
        return compare_digest(self.derive(password, len(self.key)), self.key)

    def derive(self, password: bytes, length: int) -> bytes:
        """Return `length` bytes of the derived key; raises HashError for costs that OpenSSL refuses."""
        try:
            return scrypt(
                password,
                salt=self.salt,
                n=self.n,
                r=self.r,
                p=self.p,
                dklen=length,
                maxmem=SCRYPT_MEMORY_BYTES,
            )
        except (ValueError, OverflowError):
            raise HashError("is scrypt with costs that OpenSSL does not accept") from None


@dataclass(frozen=True, slots=True)
class FirebaseScryptHash:
    """Firebase's variant: the project's signer key, encrypted with the key that scrypt derives.

    https://github.com/firebase/scrypt
    """

    scrypt: ScryptHash
    signer_key: bytes

    def cost_error(self) -> str | None:
        return self.scrypt.cost_error()

    def verify(self, password: bytes) -> bool:
        # It takes 8 MiB, and only the passwords of Firebase need it.
        from cryptography.hazmat.primitives.ciphers import Cipher  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.algorithms import AES256  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.modes import CTR  # noqa: PLC0415

        derived = self.scrypt.derive(password, AES_KEY_BYTES)
        encryptor = Cipher(AES256(derived), CTR(bytes(16))).encryptor()
        return compare_digest(encryptor.update(self.signer_key) + encryptor.finalize(), self.scrypt.key)


@dataclass(frozen=True, slots=True)
class Pbkdf2Hash:
    """PBKDF2, RFC 8018, with HMAC."""

    digest: str
    rounds: int
    salt: bytes
    key: bytes

    def cost_error(self) -> str | None:
        return _range_error(f"pbkdf2-{self.digest}", "rounds", self.rounds, MAX_PBKDF2_ROUNDS[self.digest])

    def verify(self, password: bytes) -> bool:
        if self.rounds < 1:
            raise HashError("is pbkdf2 without a round")
        # The first block is as hard to guess as the whole key; each further one would cost all rounds again.
        key = self.key[: PBKDF2_BLOCK_BYTES[self.digest]]
        derived = pbkdf2_hmac(self.digest, password, self.salt, self.rounds, len(key))
        return compare_digest(derived, key)


def _range_error(scheme: str, unit: str, number: int, most: int, least: int = 1) -> str | None:
    if least <= number <= most:
        return None
    return f"is {scheme} with {number:,} {unit}; must be at least {least:,} and at most {most:,}; {ADVICE}"


def _without(text: str, bits: int) -> str:
    """Return a text in bcrypt's base64 with only these bits of its last character."""
    return text[:-1] + BCRYPT_ALPHABET[BCRYPT_ALPHABET.index(text[-1]) & bits]


def _base64(data: bytes) -> str:
    return b64encode(data).decode().rstrip("=")
