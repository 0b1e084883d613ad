"""Tokens: their subjects, the keys that verify them, and their expiry."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from roster.errors import Unauthenticated
from service.auth.tokens import KEPT_TOKENS, Tokens
from tests.support.issuer import AUDIENCE, HOUR, ISSUER, Issuer

KINDS: dict[type[Any], type[Algorithm]] = {
    RSAPrivateKey: RSAAlgorithm,
    ec.EllipticCurvePrivateKey: ECAlgorithm,
    Ed25519PrivateKey: OKPAlgorithm,
}


@pytest.fixture(scope="module")
def rsa() -> RSAPrivateKey:
    """An RSA key, which takes a while to make."""
    return generate_private_key(65537, 2048)


class Clock:
    """A clock that the tests set."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


def jwk(key: Any, **members: str) -> dict[str, Any]:
    """Return the public half of a key as a JWK; bytes are kept as they are."""
    if isinstance(key, bytes):
        return {"kty": "oct", "k": key.decode(), **members}
    kind = next(KINDS[kind] for kind in KINDS if isinstance(key, kind))
    return {**json.loads(str(kind.to_jwk(key.public_key()))), **members}


def tokens(folder: Path, *keys: dict[str, Any], clock: Clock | None = None) -> Tokens:
    """Return an object that accepts the issuer's tokens by these keys."""
    path = folder / "jwks.json"
    path.write_text(json.dumps({"keys": keys}))
    return Tokens(ISSUER, AUDIENCE, path, clock or Clock())


def signed(key: Any, algorithm: str, **headers: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": datetime.now(UTC) + HOUR}
    return jwt.encode(claims, key, algorithm, headers)


def pem(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def test_key_accepts_only_its_own_algorithms(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """Whatever the token says; a key that names an algorithm accepts only that."""
    p256, p384, ed = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        Ed25519PrivateKey.generate(),
    )
    for key, algorithm in ((rsa, "RS256"), (p256, "ES256"), (p384, "ES384"), (ed, "EdDSA")):
        assert tokens(tmp_path, jwk(key)).subject(signed(key, algorithm)) == "ada"
    assert tokens(tmp_path, jwk(rsa, alg="PS256")).subject(signed(rsa, "PS256")) == "ada"
    with pytest.raises(Unauthenticated):
        tokens(tmp_path, jwk(rsa, alg="PS256")).subject(signed(rsa, "RS256"))


def test_token_must_be_signed_by_the_key_it_names(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """A token that names no key can be signed by any."""
    other = generate_private_key(65537, 2048)
    both = tokens(tmp_path, jwk(other, kid="a"), jwk(rsa, kid="b"))

    assert both.subject(signed(rsa, "RS256", kid="b")) == "ada"
    assert both.subject(signed(rsa, "RS256")) == "ada"
    for wrong in ("a", "c"):
        with pytest.raises(Unauthenticated):
            both.subject(signed(rsa, "RS256", kid=wrong))


def test_key_inside_a_token_is_ignored(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """No key is fetched from a URL in the token either (RFC 8725, 3.10)."""
    thief = generate_private_key(65537, 2048)
    headers = {"jwk": jwk(thief), "jku": "https://evil.example.org/jwks.json"}
    with pytest.raises(Unauthenticated):
        tokens(tmp_path, jwk(rsa)).subject(signed(thief, "RS256", **headers))


def test_unknown_critical_header_is_refused(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """RFC 7515, 4.1.11."""
    with pytest.raises(Unauthenticated):
        tokens(tmp_path, jwk(rsa)).subject(signed(rsa, "RS256", crit=["bound"], bound="other"))


@pytest.mark.parametrize("token", ["", ".", "..", "a.b.c", "é", "eyJhbGciOiJub25lIn0..", "W" * 10_000 + ".."])
def test_invalid_token_is_refused(token: str, rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """Whatever it is, no other error is raised."""
    with pytest.raises(Unauthenticated):
        tokens(tmp_path, jwk(rsa)).subject(token)


def test_valid_token_is_valid_until_it_expires(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """It is verified once, and its expiry checked each time."""
    clock = Clock()
    known, token = tokens(tmp_path, jwk(rsa), clock=clock), signed(rsa, "RS256")
    assert known.subject(token) == "ada"

    clock.now += HOUR + timedelta(seconds=29)  # clocks differ
    assert known.subject(token) == "ada"
    clock.now += timedelta(seconds=2)
    with pytest.raises(Unauthenticated):
        known.subject(token)


def test_verified_token_is_cached(
    rsa: RSAPrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of cached tokens is limited."""
    verified: list[str] = []
    decode = jwt.decode

    def counted(token: str, *arguments: Any, **named: Any) -> Any:
        verified.append(token)
        return decode(token, *arguments, **named)

    monkeypatch.setattr("service.auth.tokens.jwt.decode", counted)
    monkeypatch.setattr("service.auth.tokens.KEPT_TOKENS", 2)
    known = tokens(tmp_path, jwk(rsa))
    first, second, third = (signed(rsa, "RS256", typ=f"{number}") for number in range(3))
    for token in (first, first, second, third, first):
        known.subject(token)

    assert KEPT_TOKENS > 2
    assert verified == [first, second, third, first]


def test_token_of_a_removed_key_is_refused(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """Even if it was valid before; a file without keys changes nothing."""
    known, token = tokens(tmp_path, jwk(rsa)), signed(rsa, "RS256")
    assert known.subject(token) == "ada"

    (tmp_path / "jwks.json").write_text("{}")
    assert known.subject(token) == "ada"
    (tmp_path / "next").write_bytes(Issuer().pem)
    (tmp_path / "next").replace(tmp_path / "jwks.json")
    with pytest.raises(Unauthenticated):
        known.subject(token)


def test_pem_file_may_have_several_keys(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """As during a rotation."""
    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "keys.pem").write_bytes(b"the old one\n" + pem(rsa) + b"\nand the new one\n" + pem(other))
    known = Tokens(ISSUER, AUDIENCE, tmp_path / "keys.pem", Clock())

    assert known.subject(signed(rsa, "PS256", kid="any")) == "ada"
    assert known.subject(signed(other, "ES256")) == "ada"


def test_rsa_key_without_an_algorithm_accepts_the_same_as_in_pem(rsa: RSAPrivateKey, tmp_path: Path) -> None:
    """Its issuer chooses among those of RSA; no other kind is accepted."""
    (tmp_path / "keys.pem").write_bytes(pem(rsa))
    both = (tokens(tmp_path, jwk(rsa)), Tokens(ISSUER, AUDIENCE, tmp_path / "keys.pem", Clock()))

    for known in both:
        for algorithm in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"):
            assert known.subject(signed(rsa, algorithm)) == "ada"
        with pytest.raises(Unauthenticated):
            known.subject(signed(ec.generate_private_key(ec.SECP256R1()), "ES256"))


def test_rotation_to_an_unusable_file_keeps_the_keys(
    rsa: RSAPrivateKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One odd key of the new file does not keep the others out."""
    known, old = tokens(tmp_path, jwk(rsa, kid="old")), signed(rsa, "RS256", kid="old")
    odd = jwk(ec.generate_private_key(ec.SECP256K1()), kid="odd")
    new = ec.generate_private_key(ec.SECP256R1())

    for unusable in (b"", b'{"keys": []}', b"\xff\xfe{", json.dumps({"keys": [odd]}).encode()):
        (tmp_path / "jwks.json").write_bytes(unusable)
        assert known.subject(old) == "ada"
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [odd, jwk(new, kid="new")]}))

    assert known.subject(signed(new, "ES256", kid="new")) == "ada"
    with pytest.raises(Unauthenticated):
        known.subject(old)
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 4
