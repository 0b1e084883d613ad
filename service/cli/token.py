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


@click.group(short_help="Make keys and bearer tokens for development.")
def token() -> None:
    """Make keys and bearer tokens for development; otherwise an identity provider does."""


@token.command(short_help="Make a pair of keys in a folder.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def keys(folder: Path) -> None:
    """Make FOLDER/private.pem, for `roster token issue`, and FOLDER/jwks.json, for ROSTER_JWT_KEYS_FILE."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    jwk = OKPAlgorithm.to_jwk(public, as_dict=True) | {"kid": _key_id(public), "alg": "EdDSA", "use": "sig"}
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    folder.mkdir(0o755, parents=True, exist_ok=True)
    for path, mode, data in (
        (folder / "private.pem", 0o600, pem),
        (folder / "jwks.json", 0o644, json.dumps({"keys": [jwk]}).encode()),
    ):
        try:
            with create(path, mode) as file:
                file.write(data)
        except FileExistsError:
            raise UsageError(f"{path} is there already; it is not overwritten") from None
        echo(str(path))


@token.command(short_help="Print a token for a subject.")
@click.argument("subject")
@click.option("--key", type=FILE, required=True, help="The private.pem that `roster token keys` made.")
@option("--issuer", envvar="ROSTER_JWT_ISSUER", required=True, help="As the server has it.")
@option("--audience", envvar="ROSTER_JWT_AUDIENCE", required=True, help="As the server has it.")
@click.option(
    "--minutes", type=click.IntRange(1), default=60, show_default=True, help="How long it is valid."
)
def issue(subject: str, key: Path, issuer: str, audience: str, minutes: int) -> None:
    """Print a token for SUBJECT, whom the policy knows as jwt:SUBJECT."""
    try:
        private = OKPAlgorithm().prepare_key(key.read_bytes())
    except (OSError, ValueError, jwt.InvalidKeyError) as error:
        raise UsageError(f"{key} can't be used: {error}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{key} is no private key of `roster token keys`")
    end = datetime.now(UTC) + timedelta(minutes=minutes)
    claims = {"iss": issuer, "aud": audience, "sub": subject, "exp": end}
    headers = {"kid": _key_id(private.public_key())}
    echo(jwt.encode(claims, private, "EdDSA", headers))


def _key_id(public: Ed25519PublicKey) -> str:
    return sha256(public.public_bytes_raw()).hexdigest()[:16]
