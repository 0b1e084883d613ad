"""Token keys: key sets as providers publish them, keys that are skipped, and files that are refused."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.utils import base64url_decode, base64url_encode

from roster.errors import Unauthenticated
from service.auth.keys import read_keys
from service.auth.tokens import Tokens
from tests.support.issuer import AUDIENCE, ISSUER

# Made by jwks.py in the folder above; each of the tokens is signed by a usable key of its file.
FOLDER = Path(__file__).parents[1] / "data/field/jwks"
TOKENS: dict[str, list[str]] = json.loads((FOLDER / "tokens.json").read_text())

RSA = generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = Ed25519PrivateKey.generate()


def jwk(key: Any, **members: Any) -> dict[str, Any]:
    """Return the public half of a key as a JWK."""
    return {**json.loads(kind_of(key).to_jwk(key.public_key())), **members}


def kind_of(key: Any) -> Any:
    if isinstance(key, RSAPrivateKey):
        return RSAAlgorithm
    return ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else OKPAlgorithm


def jwks(*keys: Any) -> bytes:
    return json.dumps({"keys": keys}).encode()


def pem(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def private(key: Any, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    data: bytes = key.private_bytes(Encoding.PEM, form, NoEncryption())
    return data


GOOD = jwk(P256, kid="good")
X25519 = x25519.X25519PrivateKey.generate()


@pytest.mark.parametrize("name", TOKENS)
def test_key_sets_of_providers_verify_their_tokens(name: str) -> None:
    """Every usable key of a file verifies its own tokens, and no token of another file."""
    known = Tokens(ISSUER, AUDIENCE, FOLDER / name, lambda: datetime.now(UTC))

    assert [known.subject(token) for token in TOKENS[name]] == ["ada"] * len(TOKENS[name])
    header, claims, signature = TOKENS[name][0].split(".")
    with pytest.raises(Unauthenticated):
        known.subject(f"{header}.{claims}.{signature[::-1]}")


def test_corpus_has_a_token_for_every_file() -> None:
    """A file without one would be tested by nothing."""
    assert {path.name for path in FOLDER.iterdir()} - {"tokens.json"} == set(TOKENS)
    assert all(TOKENS.values())


SKIPPED: dict[str, tuple[dict[str, Any], str]] = {
    "secp256k1": (jwk(ec.generate_private_key(ec.SECP256K1()), alg="ES256K"), "unsupported curve"),
    "secp256k1 as P-256": (jwk(ec.generate_private_key(ec.SECP256K1()), crv="P-256"), "damaged"),
    "Ed448": (jwk(ed448.Ed448PrivateKey.generate()), "unsupported curve"),
    "X25519": (jwk(ED25519, crv="X25519"), "unsupported curve"),
    "post-quantum": ({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"}, "unsupported kty"),
    "no kty": ({"n": "AQAB"}, "unsupported kty"),
    "RSA1_5": (jwk(RSA, alg="RSA1_5"), "algorithm other than RS256"),
    "RSA-OAEP-256": (jwk(RSA, alg="RSA-OAEP-256"), "algorithm other than RS256"),
    "HS256 with a public key": (jwk(RSA, alg="HS256"), "algorithm other than RS256"),
    "none": (jwk(RSA, alg="none"), "algorithm other than RS256"),
    "ES384 for P-256": (jwk(P256, alg="ES384"), "algorithm other than ES256"),
    "encryption": (jwk(RSA, use="enc"), "is for encryption"),
    "unknown use": (jwk(RSA, use="tls"), "not for signatures"),
    "operations": (jwk(RSA, key_ops=["wrapKey"]), "not for signatures"),
    "operations of another type": (jwk(RSA, key_ops=5), "not for signatures"),
    "short RSA": (jwk(generate_private_key(65537, 1024)), "1024 bits"),
    "no modulus": ({"kty": "RSA", "e": "AQAB"}, "damaged"),
    "modulus of another type": ({"kty": "RSA", "e": "AQAB", "n": 5}, "damaged"),
    "exponent 1": (jwk(RSA, e="AQ"), "damaged"),
    "point off the curve": (jwk(P256, y=jwk(P256)["x"]), "damaged"),
    "empty x5c": ({"kty": "RSA", "x5c": ["AAAA"]}, "damaged"),
}


@pytest.mark.parametrize(("key", "why"), SKIPPED.values(), ids=SKIPPED)
def test_unusable_key_does_not_take_the_others_with_it(
    key: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line of the log names it by its kid; alone, it makes the file unusable for the same reason."""
    caplog.set_level(logging.INFO)
    odd = {**key, "kid": "odd\nkey"}

    for keys in ((odd, GOOD), (GOOD, odd)):
        caplog.clear()
        assert [each.id for each in read_keys(jwks(*keys))] == ["good"]
        (line,) = [record.getMessage() for record in caplog.records]
        assert r"'odd\nkey'" in line
        assert why in line
    with pytest.raises(ValueError, match=r"no key of the file can verify tokens: .*odd") as refused:
        read_keys(jwks(odd))
    assert why in str(refused.value)


def test_keys_for_encryption_are_skipped_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Keycloak publishes one in every set; a key that is broken is a warning."""
    caplog.set_level(logging.INFO)
    read_keys(jwks(jwk(RSA, use="enc", alg="RSA-OAEP"), "text", GOOD))

    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "number 1" in caplog.messages[0]
    assert "number 2, because it is not a JSON object" in caplog.messages[1]


OCT = {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0", "kid": "shared"}
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "neither a JWKS nor PEM"),
    "blank": (b" \r\n", "neither a JWKS nor PEM"),
    "HTML": (b"<html>login</html>", "neither a JWKS nor PEM"),
    "URL": (b"https://issuer.example.org/jwks", "download the document"),
    "OpenSSH": (
        RSA.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "ssh-keygen -e -m PKCS8",
    ),
    "DER": (RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), "DER"),
    "no JSON": (b"[", "invalid JSON"),
    "deep JSON": (b"[" * 100_000, "invalid JSON"),
    "no set": (b"{}", '{"keys": […]}'),
    "null": (b'{"keys": null}', '{"keys": […]}'),
    "empty set": (b'{"keys": []}', "it contains none"),
    "other JSON": (b'{"error": "not found"}', '{"keys": […]}'),
    "configuration": (
        json.dumps({"issuer": ISSUER, "jwks_uri": f"{ISSUER}/jwks"}).encode(),
        "OpenID configuration",
    ),
    "symmetric": (jwks(GOOD, OCT), "'shared' is private or symmetric"),
    "private JWK": (
        jwks(GOOD, {**json.loads(str(OKPAlgorithm.to_jwk(ED25519))), "kid": "signing"}),
        "'signing' is private or symmetric",
    ),
    "private JWK for encryption": (
        jwks(GOOD, {**json.loads(str(RSAAlgorithm.to_jwk(RSA))), "use": "enc"}),
        "number 2 is private",
    ),
    "private PEM": (private(ED25519), "contains a private key"),
    "private PKCS#1": (pem(P256) + private(RSA, PrivateFormat.TraditionalOpenSSL), "contains a private key"),
    "private EC": (private(P256, PrivateFormat.TraditionalOpenSSL), "openssl pkey -in FILE -pubout"),
    "no key": (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "number 1 is damaged"),
    "cut off": (pem(RSA) + pem(P256)[:80], "no matching end"),
    "end of another label": (pem(RSA).replace(b"END PUBLIC", b"END RSA PUBLIC"), "no matching end"),
    "one inside the other": (b"-----BEGIN PUBLIC KEY-----\n" + pem(RSA), "no matching end"),
    "label in two lines": (pem(RSA).replace(b"PUBLIC KEY", b"PUBLIC\nKEY"), "no matching end"),
    "secp256k1 in PEM": (pem(ec.generate_private_key(ec.SECP256K1())), "unsupported kind"),
    "X25519 in PEM": (pem(X25519), "unsupported kind"),
    "short RSA in PEM": (pem(generate_private_key(65537, 1024)), "1024 bits"),
    "request": (
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----",
        "CERTIFICATE REQUEST",
    ),
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED)
def test_unusable_files_are_refused_with_the_reason(data: bytes, why: str) -> None:
    """In one sentence, which repeats no secret."""
    with pytest.raises(ValueError, match=r".") as refused:
        read_keys(data)

    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert OCT["k"] not in str(refused.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "line", [b"-----BEGIN PUBLIC KEY-----\n", b"-----BEGIN A-----\n-----END B-----\n", b"-----BEGIN \n"]
)
def test_file_of_many_unfinished_blocks_is_refused_at_once(line: bytes) -> None:
    """Each block is looked for in its own part of the file, not in all that follows."""
    with pytest.raises(ValueError, match="no matching end"):
        read_keys(line * 100_000 + pem(RSA))


@pytest.mark.parametrize("separator", [b"", b"\n", b"\r\n\r\n", b"subject=CN = ada\n", b"-----\n"])
def test_text_between_blocks_is_ignored(separator: bytes) -> None:
    """As OpenSSL ignores it: RFC 7468, section 2."""
    data = separator + pem(RSA) + separator + pem(P256) + separator

    assert [key.algorithms[0] for key in read_keys(data)] == ["RS256", "ES256"]


def test_unusable_pem_key_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """By its position, because PEM has no names."""
    data = pem(RSA) + pem(ec.generate_private_key(ec.SECP256K1())) + pem(P256)

    assert [key.algorithms[0] for key in read_keys(data)] == ["RS256", "ES256"]
    assert "number 2" in caplog.text


def test_authority_of_a_chain_signs_no_tokens(caplog: pytest.LogCaptureFixture) -> None:
    """Its certificate is in the file for those who verify the other one."""
    (key,) = read_keys((FOLDER / "chain.pem").read_bytes())
    (alone,) = read_keys((FOLDER / "certificate.pem").read_bytes())

    assert key.public == alone.public
    assert "number 2, because it is of an authority" in caplog.text


def p256_with_zero() -> ec.EllipticCurvePrivateKey:
    """Return a key whose x begins with a zero; one in 256 has one."""
    while True:
        key = ec.generate_private_key(ec.SECP256R1())
        if key.public_key().public_numbers().x < 1 << 248:
            return key


def of_length(key: ec.EllipticCurvePrivateKey, length: int) -> dict[str, Any]:
    """Return a JWK whose x has this many bytes."""
    x = key.public_key().public_numbers().x.to_bytes(length)
    return jwk(key, x=base64url_encode(x).decode())


ZERO = p256_with_zero()
COORDINATES: dict[str, dict[str, Any]] = {
    "zero omitted": of_length(ZERO, 31),
    "zero for the sign": of_length(P256, 33),
    "zero for the sign of P-384": of_length(ec.generate_private_key(ec.SECP384R1()), 49),
    "P-521 in full": of_length(ec.generate_private_key(ec.SECP521R1()), 66),
    # https://github.com/jwt/ruby-jwt/issues/412
    "of a Java program": {
        "kty": "EC",
        "crv": "P-256",
        "x": "0Nv5IKAlkvXuAKmOmFgmrwXKR7qGePOzu_7RXg5msw",
        "y": "FqnPSNutcjfvXNlufwb7nLJuUEnBkbMdZ3P79nY9c3k",
    },
}


@pytest.mark.parametrize("key", COORDINATES.values(), ids=COORDINATES)
def test_coordinates_may_have_other_lengths(key: dict[str, Any]) -> None:
    """The point is the same; a wrong one would not be on the curve."""
    [read] = read_keys(jwks(key))

    x = int.from_bytes(base64url_decode(key["x"]))
    assert isinstance(read.public, ec.EllipticCurvePublicKey)
    assert read.public.public_numbers().x == x


@pytest.mark.parametrize("length", [34, 64])
def test_coordinates_larger_than_the_curve_are_refused(length: int) -> None:
    """They are no spelling of another point."""
    x = base64url_encode(b"\1" * length).decode()

    with pytest.raises(ValueError, match="a member is missing or damaged"):
        read_keys(jwks(jwk(P256, x=x)))


@pytest.mark.parametrize(
    "members",
    [
        {"use": ""},
        {"alg": ""},
        {"use": "", "alg": "", "kid": "", "x5c": "", "x5t": "", "key_ops": ""},
        {"x5c": []},
        {"kid": 7},
        {"use": None, "alg": None},
    ],
)
@pytest.mark.parametrize("key", [RSA, P256, ED25519])
def test_empty_members_are_absent(key: Any, members: dict[str, Any]) -> None:
    """Some issuers write all members that they know, whether they have a value or not."""
    [read] = read_keys(jwks(jwk(key, **members)))
    [plain] = read_keys(jwks(jwk(key)))

    assert read.algorithms == plain.algorithms
    assert read.id is None


@pytest.mark.parametrize("member", ["d", "k", "p"])
def test_an_empty_secret_is_still_refused(member: str) -> None:
    """Whoever wrote it exports private keys."""
    with pytest.raises(ValueError, match="private or symmetric"):
        read_keys(jwks(jwk(RSA, **{member: ""})))
