"""Bearer tokens: JWTs (RFC 7519), validated according to RFC 8725, the best practices for JWTs."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from service.auth.reloading import ReloadingFile
from service.errors import Unauthenticated

LEEWAY_SECONDS = 30
MIN_RSA_BITS = 2048
KEPT_TOKENS = 4096
REQUIRED = ["iss", "aud", "exp", "sub"]
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
PEM_END = b"-----END PUBLIC KEY-----"


@dataclass(frozen=True)
class Key:
    """A public key with the algorithms that it allows; the header of a token does not choose."""

    id: str | None
    public: Any
    algorithms: Sequence[str]


class Tokens:
    """Validates the tokens of one issuer; its keys are reloaded when their file changes."""

    def __init__(self, issuer: str, audience: str, keys: Path, clock: Callable[[], datetime]) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys = ReloadingFile(read_keys, keys)
        self._clock = clock
        # Verifying a signature takes about 150 µs, a digest 1 µs. The tokens themselves are not kept.
        self._verified: dict[bytes, tuple[str, float]] = {}
        self._known = self._keys.current()

    def subject(self, token: str) -> str:
        """Return the subject of a token; raises Unauthenticated if it is not valid."""
        if (keys := self._keys.current()) is not self._known:
            self._known = keys
            self._verified.clear()
        digest = sha256(token.encode()).digest()
        subject, end = self._verified.get(digest) or self._verify(token, digest)
        if end <= self._clock().timestamp():
            raise Unauthenticated.because("the token has expired")
        return subject

    def _verify(self, token: str, digest: bytes) -> tuple[str, float]:
        try:
            claims = self._claims(token)
        except (jwt.PyJWTError, RecursionError, OverflowError) as error:
            # As repr: some of these messages repeat text of the token, which can contain line breaks.
            raise Unauthenticated.because(f"the token is not valid: {error!r}") from None
        if len(self._verified) >= KEPT_TOKENS:
            del self._verified[next(iter(self._verified))]
        self._verified[digest] = claims["sub"], int(claims["exp"]) + LEEWAY_SECONDS
        return self._verified[digest]

    def _claims(self, token: str) -> dict[str, Any]:
        named = jwt.get_unverified_header(token).get("kid")
        for key in self._known:
            if None not in (named, key.id) and named != key.id:
                continue
            with suppress(jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                return jwt.decode(
                    token,
                    key.public,
                    key.algorithms,
                    {"require": REQUIRED},
                    issuer=self._issuer,
                    audience=self._audience,
                    leeway=LEEWAY_SECONDS,
                )
        raise jwt.InvalidSignatureError("it is not signed with any of the keys")


def read_keys(data: bytes) -> list[Key]:
    """Return the keys of a JWKS, or of a file of public keys in PEM; raises ValueError."""
    if data.lstrip().startswith(b"{"):
        found = [key for key in jwt.PyJWKSet.from_json(data.decode()).keys if key.public_key_use != "enc"]
        keys = [Key(key.key_id, key.key, _algorithms(key.key, key.algorithm_name)) for key in found]
    else:
        blocks = [block + PEM_END for block in data.split(PEM_END)[:-1]]
        keys = [Key(None, key, _algorithms(key)) for key in map(load_pem_public_key, blocks)]
    if not keys:
        raise ValueError("the file contains no key; it must be a JWKS, or public keys in PEM")
    return keys


def _algorithms(key: Any, named: str | None = None) -> Sequence[str]:
    allowed: list[str] = []
    match key:
        case RSAPublicKey() if key.key_size >= MIN_RSA_BITS:
            allowed = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]
        case EllipticCurvePublicKey() if key.curve.name in CURVES:
            allowed = [CURVES[key.curve.name]]
        case Ed25519PublicKey():
            allowed = ["EdDSA"]
    if not allowed or named not in (None, *allowed):
        raise ValueError(
            f"keys must be public keys: RSA of {MIN_RSA_BITS} bits or more, P-256, P-384, P-521 or Ed25519"
        )
    return [named] if named else allowed
