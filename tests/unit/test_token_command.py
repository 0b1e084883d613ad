"""`roster token`: keys and tokens for development."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from service.cli import main
from tests.support.issuer import AUDIENCE, ISSUER

NAMED = ("--issuer", ISSUER, "--audience", AUDIENCE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with keys."""
    assert token("keys", str(tmp_path)).exit_code == 0
    return tmp_path


def token(*words: str) -> Result:
    return CliRunner().invoke(main, ["token", *words])


def read_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the files of a directory, with their modes."""
    return {path.name: (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) for path in folder.iterdir()}


def test_creates_private_keys_and_never_overwrites_them(folder: Path) -> None:
    """The private key can impersonate anyone, so only its owner can read it."""
    before = read_files(folder)
    again = token("keys", str(folder))

    assert {name: mode for name, (mode, _) in before.items()} == {"private.pem": 0o600, "jwks.json": 0o644}
    assert (again.exit_code, read_files(folder)) == (2, before)
    assert "private.pem already exists" in again.output


def test_keys_of_the_server_are_public(folder: Path) -> None:
    """They can verify tokens, but not sign them."""
    [key] = jwt.PyJWKSet.from_json((folder / "jwks.json").read_text()).keys

    assert not hasattr(key.key, "sign")


def test_token_has_its_subject_and_expiry(folder: Path) -> None:
    """Issuer and audience match the server's settings."""
    private = str(folder / "private.pem")
    made = token("issue", "ada", "--key", private, "--minutes", "5", *NAMED).output.strip()

    [key] = jwt.PyJWKSet.from_json((folder / "jwks.json").read_text()).keys
    claims = jwt.decode(made, key, issuer=ISSUER, audience=AUDIENCE)
    assert claims["sub"] == "ada"
    assert datetime.fromtimestamp(claims["exp"], UTC) < datetime.now(UTC) + timedelta(minutes=5)
    assert jwt.get_unverified_header(made)["kid"] == key.key_id


@pytest.mark.parametrize("name", ["jwks.json", "missing.pem", "public.pem"])
def test_token_requires_the_private_key(name: str, folder: Path) -> None:
    """Other files are refused in one line."""
    [key] = jwt.PyJWKSet.from_json((folder / "jwks.json").read_text()).keys
    public = key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    refused = token("issue", "ada", "--key", str(folder / name), *NAMED)

    assert refused.exit_code == 2
    assert name in refused.output
