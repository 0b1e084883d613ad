"""Bearer tokens for the tests, and their issuer."""

import base64
import hmac
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER = "https://issuer.example.org"
AUDIENCE = "roster"
HOUR = timedelta(hours=1)


class Issuer:
    """Signs tokens with an RSA key, whose public half is `pem`."""

    def __init__(self) -> None:
        self._private = generate_private_key(65537, 2048)
        self.pem = self._private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def write(self, folder: Path) -> Path:
        """Write the public key to a file of a folder, and return that."""
        (folder / "keys.pem").write_bytes(self.pem)
        return folder / "keys.pem"

    def token(self, subject: str = "ada", headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """Return a valid token, except for the claims and headers given; None omits a claim."""
        return jwt.encode(_claims(subject, **claims), self._private, "RS256", headers)

    def unsigned(self, subject: str = "ada") -> str:
        """Return a token with `alg: none`."""
        return jwt.encode(_claims(subject), "", "none")

    def hs256_token(self, subject: str = "ada") -> str:
        """Return a token signed by HS256 with the public key as the secret; no library makes one."""
        claims = {**_claims(subject), "exp": int((datetime.now(UTC) + HOUR).timestamp())}
        parts = [_segment({"alg": "HS256", "typ": "JWT"}), _segment(claims)]
        signature = hmac.digest(self.pem, b".".join(parts), "sha256")
        return b".".join([*parts, _base64(signature)]).decode()


def _claims(subject: str, **claims: Any) -> dict[str, Any]:
    right = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": datetime.now(UTC) + HOUR}
    return {name: value for name, value in (right | claims).items() if value is not None}


def _segment(document: dict[str, Any]) -> bytes:
    return _base64(json.dumps(document).encode())


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
