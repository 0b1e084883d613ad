"""`roster token`: keys and bearer tokens for development."""

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import click
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import OKPAlgorithm

from service.cli.terminal import FILE, UsageError, echo, option
from service.files import create


@click.group()
def token() -> None:
    """Create keys and bearer tokens for development. In production, use an identity provider."""


@token.command(short_help="Create a key pair in a directory.")
@click.argument("folder", metavar="DIRECTORY", type=click.Path(path_type=Path, file_okay=False))
def keys(folder: Path) -> None:
    """Create a key pair: private.pem, for `roster token issue`, and jwks.json, for ROSTER_JWT_KEYS_FILE."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    jwk = OKPAlgorithm.to_jwk(public, as_dict=True) | {"kid": _key_id(public), "alg": "EdDSA", "use": "sig"}
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        folder.mkdir(0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"directory {folder} can't be created: {error.strerror}") from None
    for path, mode, data in (
        (folder / "private.pem", 0o600, pem),
        (folder / "jwks.json", 0o644, json.dumps({"keys": [jwk]}).encode()),
    ):
        try:
            with create(path, mode) as file:
                file.write(data)
        except FileExistsError:
            raise UsageError(f"{path} already exists and was not overwritten") from None
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror}") from None
        echo(str(path))


@token.command(short_help="Print a bearer token for a subject.")
@click.argument("subject")
@click.option("--key", type=FILE, required=True, help="The private.pem of `roster token keys`.")
@option("--issuer", envvar="ROSTER_JWT_ISSUER", required=True, help="Issuer that the server expects.")
@option("--audience", envvar="ROSTER_JWT_AUDIENCE", required=True, help="Audience that the server expects.")
@click.option(
    "--minutes",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Minutes until the token expires.",
)
def issue(subject: str, key: Path, issuer: str, audience: str, minutes: int) -> None:
    """Print a bearer token for SUBJECT. The server's policy refers to it as jwt:SUBJECT."""
    try:
        private = OKPAlgorithm().prepare_key(key.read_bytes())
    except (OSError, ValueError, jwt.InvalidKeyError) as error:
        raise UsageError(f"{key} can't be used: {error}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{key} is not a private key of `roster token keys`")
    end = datetime.now(UTC) + timedelta(minutes=minutes)
    claims = {"iss": issuer, "aud": audience, "sub": subject, "exp": end}
    headers = {"kid": _key_id(private.public_key())}
    echo(jwt.encode(claims, private, "EdDSA", headers))


def _key_id(public: Ed25519PublicKey) -> str:
    return sha256(public.public_bytes_raw()).hexdigest()[:16]
