"""Public keys of an issuer: a JWKS (RFC 7517), or keys and certificates in PEM (RFC 7468).

Providers publish keys of several kinds in one file. A key that can't verify tokens is skipped, so that the
others stay usable; the file is refused if no key is left. A secret in it is always refused.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import Certificate, Name, load_pem_x509_certificate
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.utils import base64url_decode, base64url_encode

MIN_RSA_BITS = 2048
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
Jwk: TypeAlias = dict[str, Any]  # as PyJWT has it
KINDS: Mapping[str, Callable[[Jwk], object]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}
KEY_MEMBERS = {"RSA": "n", "EC": "x", "OKP": "x"}
COORDINATE_BYTES = {"P-256": 32, "P-384": 48, "P-521": 66}
CURVES_OF_KIND = {"EC": ["P-256", "P-384", "P-521"], "OKP": ["Ed25519"]}
SUPPORTED = f"RSA of {MIN_RSA_BITS} bits or more, P-256, P-384, P-521 or Ed25519"
SECRET_MEMBERS = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}
BEGIN = "-----BEGIN "
DASHES = "-----"
LABEL = re.compile("[A-Z0-9 ]+")
UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, PyJWTError, UnsupportedAlgorithm)
ENCRYPTION_ONLY = "is for encryption"

log = logging.getLogger(__name__)


PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True)
class Key:
    """A public key with the algorithms that it allows; the header of a token does not choose."""

    id: str | None
    public: PublicKey
    algorithms: Sequence[str]


class UnusableKeyError(Exception):
    """A key that can't verify tokens. The message ends a sentence that begins with its name."""


def read_keys(data: bytes) -> list[Key]:
    """Return the keys of a JWKS, or of a file of public keys and certificates in PEM.

    Logs a line for each key that is skipped. Raises ValueError for a file without a usable key, and for one
    that contains a private or a symmetric key.
    """
    text = _text(data)
    if text.startswith(("{", "[")):
        found = _json_keys(_document(text))
    elif BEGIN in text:
        found = _pem_keys(text)
    else:
        raise ValueError(f"it is neither a JWKS nor PEM{_hint(text)}")
    keys: list[Key] = []
    skipped: list[str] = []
    for name, key in found:
        if isinstance(key, Key):
            keys.append(key)
            continue
        # Providers publish keys for encryption in the same set, so these are nothing to worry about.
        level = logging.INFO if str(key) == ENCRYPTION_ONLY else logging.WARNING
        log.log(level, "skipped the token key %s, because it %s", name, key)
        skipped.append(f"{name} {key}")
    if not keys:
        why = "; ".join(skipped[:3]) or "it contains none"
        raise ValueError(f"no key of the file can verify tokens: {why}")
    return keys


Found: TypeAlias = Iterator[tuple[str, Key | UnusableKeyError]]


def _text(data: bytes) -> str:
    # PowerShell writes UTF-16, and Windows editors a byte order mark.
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding).strip()
    except UnicodeDecodeError:
        raise ValueError(
            "it is not text; convert DER with `openssl x509 -inform DER` or `openssl pkey -pubin -inform DER`"
        ) from None


def _hint(text: str) -> str:
    if text.startswith(("ssh-", "ecdsa-sha2-")):
        return ", but a key of OpenSSH; convert it with `ssh-keygen -e -m PKCS8 -f FILE`"
    if text.startswith(("http://", "https://")):
        return ", but a URL; download the document that it names"
    return "; it must be what the issuer's jwks_uri returns, or have lines such as -----BEGIN PUBLIC KEY-----"


def _document(text: str) -> object:
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not a JWKS: invalid JSON, {error}") from None
    return document


def _json_keys(document: object) -> Found:
    """Yield the keys of a set, of one JWK, of a list of them, or of Google's JSON of certificates."""
    if isinstance(document, dict) and "keys" in document:
        document = document["keys"]
    elif isinstance(document, dict) and "kty" in document:
        document = [document]
    elif isinstance(document, dict) and "jwks_uri" in document:
        raise ValueError("it is an OpenID configuration, not a JWKS; download what its jwks_uri names")
    elif isinstance(document, dict) and document:
        return _certificates_by_id(document)
    if isinstance(document, list):
        return _jwks(document)
    raise ValueError('it is not a JWKS: it must be {"keys": […]}')


def _certificates_by_id(document: Mapping[str, object]) -> Found:
    texts = {id: text for id, text in document.items() if isinstance(text, str) and BEGIN in text}
    if len(texts) < len(document):
        raise ValueError('it is JSON, but not a JWKS: it must be {"keys": […]}')
    for id, text in texts.items():
        for _, key in _pem_keys(text):
            named = Key(id, key.public, key.algorithms) if isinstance(key, Key) else key
            yield repr(id), named


def _jwks(document: Sequence[object]) -> Found:
    for number, jwk in enumerate(document, 1):
        id = jwk.get("kid") if isinstance(jwk, dict) else None
        name = repr(id) if isinstance(id, str) else f"number {number}"
        if isinstance(jwk, dict) and (SECRET_MEMBERS & jwk.keys() or jwk.get("kty") == "oct"):
            raise ValueError(
                f"the key {name} is private or symmetric; the file must contain only public keys, "
                "and only the issuer may have the others"
            )
        try:
            yield name, _key_from_jwk(jwk)
        except UnusableKeyError as error:
            yield name, error


def _key_from_jwk(jwk: object) -> Key:
    if not isinstance(jwk, dict):
        raise UnusableKeyError("is not a JSON object")
    jwk = {member: value for member, value in jwk.items() if value != ""}  # some issuers write all members
    if jwk.get("use") == "enc":
        raise UnusableKeyError(ENCRYPTION_ONLY)
    operations = jwk.get("key_ops") or ["verify"]
    can_verify = isinstance(operations, list) and "verify" in operations
    if jwk.get("use") not in (None, "sig") or not can_verify:
        raise UnusableKeyError("is not for signatures, by its use or key_ops")
    id = jwk.get("kid")
    return _key(id if isinstance(id, str) else None, _public_from_jwk(jwk), jwk.get("alg"))


def _public_from_jwk(jwk: Jwk) -> object:
    kind = jwk.get("kty")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnusableKeyError(f"has an unsupported kty; supported are {', '.join(KINDS)}")
    try:
        if KEY_MEMBERS[kind] not in jwk and jwk.get("x5c"):
            return _public_from_x5c(jwk["x5c"])
        if kind in CURVES_OF_KIND and jwk.get("crv") not in CURVES_OF_KIND[kind]:
            raise UnusableKeyError(f"is of an unsupported curve; supported are {SUPPORTED}")
        return KINDS[kind](_with_full_coordinates(jwk))
    except UNREADABLE:
        raise UnusableKeyError("can't be read: a member is missing or damaged") from None


def _with_full_coordinates(jwk: Jwk) -> Jwk:
    """Return a JWK whose coordinates have the length of its curve, as RFC 7518, 6.2.1.2, requires.

    Some issuers omit zeros at the beginning, which one key in 256 has, or write one for the sign.
    """
    members = dict(jwk)
    size = COORDINATE_BYTES.get(str(jwk.get("crv"))) if jwk["kty"] == "EC" else None
    if size:
        for name in ("x", "y"):
            number = int.from_bytes(base64url_decode(jwk[name]))
            members[name] = base64url_encode(number.to_bytes(size)).decode()
    return members


def _public_from_x5c(chain: Sequence[str]) -> object:
    """Return the key of the first certificate, which RFC 7517, 4.7, requires to be the key's own."""
    pem = f"-----BEGIN CERTIFICATE-----\n{chain[0]}\n-----END CERTIFICATE-----\n"
    return load_pem_x509_certificate(pem.encode()).public_key()


def _pem_keys(text: str) -> Found:
    blocks = [*_blocks(text)]
    if any("PRIVATE KEY" in label for label, _ in blocks):
        raise ValueError(
            "it contains a private key, which only the issuer should have; "
            "write the public one with `openssl pkey -in FILE -pubout`"
        )
    loaded = [_load_block(label, pem) for label, pem in blocks]
    issuers = {_issuer(block) for block in loaded if isinstance(block, Certificate)}
    for number, block in enumerate(loaded, 1):
        name = f"number {number}"
        try:
            yield name, _key(None, _public_from_block(block, issuers))
        except UnusableKeyError as error:
            yield name, error


def _blocks(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield the label and the text of each block; raises ValueError for one that does not end."""
    for part in text.split(BEGIN)[1:]:
        label, _, rest = part.partition(DASHES)
        end = f"{DASHES}END {label}{DASHES}"
        content, found, _ = rest.partition(end)
        if not (found and LABEL.fullmatch(label)):
            raise ValueError("a block of PEM has no matching end; the file may be cut off")
        yield label, f"{BEGIN}{label}{DASHES}{content}{end}".encode()


def _public_from_block(block: object, issuers: Collection[Name | None]) -> object:
    """Return the key of a block; not that of an authority, which is in the file as part of a chain."""
    if isinstance(block, UnusableKeyError):
        raise block
    if not isinstance(block, Certificate):
        return block
    if block.subject in issuers:
        raise UnusableKeyError("is of an authority that issued another certificate in the file")
    try:
        return block.public_key()
    except UNREADABLE:
        raise UnusableKeyError("is a certificate whose key is of an unsupported kind") from None


def _load_block(label: str, pem: bytes) -> object:
    """Return a certificate, a public key, or why the block is neither."""
    if not label.endswith(("PUBLIC KEY", "CERTIFICATE")):
        return UnusableKeyError(f"is not a public key or a certificate, but {label}")
    try:
        if label.endswith("CERTIFICATE"):
            return load_pem_x509_certificate(pem)
        return load_pem_public_key(pem)
    except UNREADABLE:
        return UnusableKeyError("is damaged, or of an unsupported kind")


def _issuer(certificate: Certificate) -> Name | None:
    """Return the name of the authority that issued a certificate; None if that is the certificate itself."""
    return None if certificate.issuer == certificate.subject else certificate.issuer


def _key(id: str | None, public: object, named: object = None) -> Key:
    """Return a key with its algorithms; `named` is the only one that its issuer uses, if the issuer says so.

    Raises UnusableKeyError.
    """
    match public:
        case RSAPublicKey() if public.key_size < MIN_RSA_BITS:
            raise UnusableKeyError(f"is RSA of {public.key_size} bits; must be {MIN_RSA_BITS} bits or more")
        case RSAPublicKey():
            allowed = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]
        case EllipticCurvePublicKey() if public.curve.name in CURVES:
            allowed = [CURVES[public.curve.name]]
        case Ed25519PublicKey():
            allowed = ["EdDSA"]
        case _:
            raise UnusableKeyError(f"is of an unsupported kind; supported are {SUPPORTED}")
    if named is None:
        return Key(id, public, allowed)
    if named not in allowed:
        raise UnusableKeyError(f"is for an algorithm other than {', '.join(allowed)}")
    return Key(id, public, [str(named)])
