"""Make the files of jwks/: key sets as providers publish them, with new keys, and a token for each file.

    .venv/bin/python tests/data/field/jwks.py

The members, their order and their forms are those of public documents of each provider in 2025. The private
keys are thrown away: tokens.json has one token for each usable key of each file, valid until 2100.
"""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

FOLDER = Path(__file__).parent / "jwks"
CLAIMS = {
    "iss": "https://issuer.example.org",
    "aud": "roster",
    "sub": "ada",
    "exp": int(datetime(2100, 1, 1, tzinfo=UTC).timestamp()),
}
KEYS = [rsa.generate_private_key(65537, 2048) for _ in range(3)]
FIRST, SECOND, THIRD = KEYS
P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
NAMES = ("3f1c2d7a9b", "b70e44c18d", "58a9fe02c6")

files: dict[str, bytes] = {}
tokens: dict[str, list[str]] = {}


def url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def numbers(key: Any) -> dict[str, str]:
    """Return the members of the public half of a key."""
    kind: Any = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}
    found = next((kind[each] for each in kind if isinstance(key, each)), OKPAlgorithm)
    members = json.loads(found.to_jwk(key.public_key()))
    return {name: members[name] for name in ("kty", "crv", "n", "e", "x", "y") if name in members}


def certificate(key: Any, subject: str, signer: Any = None, issuer: str = "") -> x509.Certificate:
    """Return a certificate, by default signed with its own key."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer or subject)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=3650))
        .sign(signer or key, SHA256())
    )


def chain(key: Any, subject: str) -> dict[str, Any]:
    der = certificate(key, subject).public_bytes(Encoding.DER)
    return {"x5c": [base64.b64encode(der).decode()], "x5t": url(sha1(der).digest())}


def thumbprint(key: Any) -> str:
    der = certificate(key, "thumbprint").public_bytes(Encoding.DER)
    return url(sha256(der).digest())


def pem(key: Any, form: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> bytes:
    data: bytes = key.public_key().public_bytes(Encoding.PEM, form)
    return data


def sign(key: Any, algorithm: str, id: str | None) -> str:
    return jwt.encode(CLAIMS, key, algorithm, {"kid": id} if id else None)


def add(name: str, content: Any, *signed: tuple[Any, str, str | None]) -> None:
    """Add a file, JSON unless it is bytes, and tokens of its usable keys."""
    files[name] = content if isinstance(content, bytes) else json.dumps(content, indent=2).encode()
    tokens[name] = [sign(*each) for each in signed]


def add_providers() -> None:
    """Add the sets of providers."""
    one, two, three = NAMES
    sig: dict[str, str] = {"use": "sig"}
    add(
        "google.json",
        {
            "keys": [
                {**numbers(key), **sig, "alg": "RS256", "kid": id}
                for key, id in zip((FIRST, SECOND), NAMES, strict=False)
            ]
        },
        (FIRST, "RS256", one),
        (SECOND, "RS256", two),
    )
    add(
        "google-certificates.json",  # of Firebase's securetoken, and www.googleapis.com/oauth2/v1/certs
        {
            id: certificate(key, "securetoken.system").public_bytes(Encoding.PEM).decode()
            for key, id in zip((FIRST, SECOND), NAMES, strict=False)
        },
        (FIRST, "RS256", one),
        (SECOND, "RS256", two),
    )
    add(
        "auth0.json",
        {"keys": [{"alg": "RS256", **numbers(FIRST), **sig, "kid": one, **chain(FIRST, "tenant.auth0.com")}]},
        (FIRST, "RS256", one),
    )
    add(
        "entra.json",  # has no alg
        {
            "keys": [
                {
                    **sig,
                    "kid": id,
                    **numbers(key),
                    **chain(key, "accounts.accesscontrol.windows.net"),
                    "cloud_instance_name": "microsoftonline.com",
                    "issuer": "https://login.microsoftonline.com/{tenantid}/v2.0",
                }
                for key, id in zip(KEYS, NAMES, strict=True)
            ]
        },
        (FIRST, "RS256", one),
        (THIRD, "RS256", three),
    )
    add(
        "azure-b2c.json",
        {"keys": [{"kid": one, "nbf": 1493763266, **sig, **numbers(FIRST)}]},
        (FIRST, "RS256", one),
    )
    add(
        "okta.json",
        {"keys": [{"kty": "RSA", "alg": "RS256", "kid": one, **sig, **numbers(FIRST)}]},
        (FIRST, "RS256", one),
    )
    add(
        "keycloak.json",
        {
            "keys": [
                {"kid": one, "alg": "RSA-OAEP", "use": "enc", **numbers(FIRST), **chain(FIRST, "master")},
                {
                    "kid": two,
                    **numbers(SECOND),
                    "alg": "RS256",
                    **sig,
                    **chain(SECOND, "master"),
                    "x5t#S256": thumbprint(SECOND),
                },
                {"kid": three, **numbers(ED25519), "alg": "EdDSA", **sig},
            ]
        },
        (SECOND, "RS256", two),
        (ED25519, "EdDSA", three),
    )
    add(
        "cognito.json",
        {
            "keys": [
                {"alg": "RS256", "e": "AQAB", "kid": id, **numbers(key), **sig}
                for key, id in zip((FIRST, SECOND), NAMES, strict=False)
            ]
        },
        (SECOND, "RS256", two),
    )
    add(
        "github-actions.json",
        {
            "keys": [
                {**numbers(FIRST), "alg": "RS256", **sig, "kid": one, **chain(FIRST, "token.actions")},
                {"kty": "RSA", **sig, "kid": two, "alg": "RS256", **numbers(SECOND)},
            ]
        },
        (FIRST, "RS256", one),
        (SECOND, "RS256", two),
    )
    add(
        "kubernetes.json",
        {"keys": [{**sig, "kty": "RSA", "kid": url(b"k" * 32), "alg": "RS256", **numbers(FIRST)}]},
        (FIRST, "RS256", url(b"k" * 32)),
    )


def add_mixed() -> None:
    """Add sets in which some keys can't verify tokens, and other unusual ones."""
    one, two, three = NAMES
    secp256k1 = ec.generate_private_key(ec.SECP256K1())
    others = [
        {**numbers(secp256k1), "use": "sig", "alg": "ES256K", "kid": "wallet"},
        {**numbers(ed448.Ed448PrivateKey.generate()), "use": "sig", "alg": "EdDSA", "kid": "ed448"},
        {
            "kty": "OKP",
            "crv": "X25519",
            "x": url(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw()),
            "kid": "x25519",
        },
        {**numbers(THIRD), "alg": "RSA1_5", "kid": "rsa1_5"},
        {**numbers(THIRD), "key_ops": ["encrypt"], "kid": "encrypt"},
        {**numbers(rsa.generate_private_key(65537, 1024)), "kid": "short"},
        {"kty": "AKP", "alg": "ML-DSA-44", "pub": url(b"p" * 1312), "kid": "post-quantum"},
        {"kty": "RSA", "e": "AQAB", "kid": "no-modulus"},
    ]
    good = [{**numbers(P256), "use": "sig", "kid": one}, {**numbers(FIRST), "kid": two}]
    add("mixed.json", {"keys": [*others, *good]}, (P256, "ES256", one), (FIRST, "PS384", two))
    add("one-jwk.json", {**numbers(FIRST), "kid": one}, (FIRST, "RS512", one))
    add("duplicate-kid.json", {"keys": [{**numbers(FIRST), "kid": one}, {**numbers(SECOND), "kid": one}]})
    tokens["duplicate-kid.json"] = [sign(FIRST, "RS256", one), sign(SECOND, "RS256", one)]
    add("no-kid.json", {"keys": [numbers(FIRST)]}, (FIRST, "RS256", None), (FIRST, "RS256", three))
    x5c = {"kty": "RSA", "use": "sig", "kid": one, **chain(FIRST, "adfs")}
    add("x5c-only.json", {"keys": [x5c]}, (FIRST, "RS256", one))
    marked = json.dumps({"keys": [{**numbers(FIRST), "kid": one}]}, indent=2).replace("\n", "\r\n")
    add("windows.json", marked.encode("utf-8-sig"), (FIRST, "RS256", one))
    add("powershell.json", marked.encode("utf-16"), (FIRST, "RS256", one))


def add_pem() -> None:
    """Add files in PEM."""
    authority = certificate(SECOND, "authority")
    leaf = certificate(FIRST, "leaf", SECOND, "authority")
    add("pkcs1.pem", pem(FIRST, PublicFormat.PKCS1), (FIRST, "RS256", None))
    add("spki.pem", pem(P256), (P256, "ES256", None))
    add("certificate.pem", certificate(FIRST, "alone").public_bytes(Encoding.PEM), (FIRST, "PS256", None))
    both = b"".join(each.public_bytes(Encoding.PEM) for each in (leaf, authority))
    add("chain.pem", both, (FIRST, "RS256", None))
    rotation = b"# until June\n" + pem(FIRST) + b"\n# from May\n" + pem(SECOND, PublicFormat.PKCS1)
    add("rotation.pem", rotation, (FIRST, "RS256", None), (SECOND, "RS256", None))
    windows = b"\xef\xbb\xbf" + pem(FIRST).replace(b"\n", b"\r\n")
    add("windows.pem", windows, (FIRST, "RS256", None))
    indented = b"".join(b"    " + line for line in pem(FIRST).splitlines(keepends=True))
    add("indented.pem", indented, (FIRST, "RS256", None))


def main() -> None:
    """Write all files."""
    makers: list[Callable[[], None]] = [add_providers, add_mixed, add_pem]
    for make in makers:
        make()
    FOLDER.mkdir(exist_ok=True)
    for name, data in files.items():
        (FOLDER / name).write_bytes(data)
    (FOLDER / "tokens.json").write_text(json.dumps(tokens, indent=2) + "\n")


if __name__ == "__main__":
    main()
