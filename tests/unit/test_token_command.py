"""`roster token`: keys and tokens for development."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from service.cli import main
from tests.issuer import AUDIENCE, ISSUER

NAMED = ("--issuer", ISSUER, "--audience", AUDIENCE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with keys."""
    assert token("keys", str(tmp_path)).exit_code == 0
    return tmp_path


def token(*words: str) -> Result:
    return CliRunner().invoke(main, ["token", *words])


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The files of a folder, with their modes."""
    return {path.name: (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) for path in folder.iterdir()}


def test_keys_are_for_their_owner_and_are_not_overwritten(folder: Path) -> None:
    """Whoever has the private one is whoever they like."""
    before = written(folder)
    again = token("keys", str(folder))

    assert {name: mode for name, (mode, _) in before.items()} == {"private.pem": 0o600, "jwks.json": 0o644}
    assert (again.exit_code, written(folder)) == (2, before)
    assert "private.pem is there already" in again.output


def test_the_keys_that_a_server_gets_are_no_secret(folder: Path) -> None:
    """They verify, and can't sign."""
    [key] = jwt.PyJWKSet.from_json((folder / "jwks.json").read_text()).keys

    assert not hasattr(key.key, "sign")


def test_a_token_says_whose_it_is_and_until_when(folder: Path) -> None:
    """Issuer and audience are those of the server's settings."""
    private = str(folder / "private.pem")
    made = token("issue", "ada", "--key", private, "--minutes", "5", *NAMED).output.strip()

    [key] = jwt.PyJWKSet.from_json((folder / "jwks.json").read_text()).keys
    claims = jwt.decode(made, key, issuer=ISSUER, audience=AUDIENCE)
    assert claims["sub"] == "ada"
    assert datetime.fromtimestamp(claims["exp"], UTC) < datetime.now(UTC) + timedelta(minutes=5)
    assert jwt.get_unverified_header(made)["kid"] == key.key_id


@pytest.mark.parametrize("name", ["jwks.json", "missing.pem", "public.pem"])
def test_a_token_needs_the_private_key(name: str, folder: Path) -> None:
    """Anything else is refused in one line."""
    [key] = jwt.PyJWKSet.from_json((folder / "jwks.json").read_text()).keys
    public = key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    refused = token("issue", "ada", "--key", str(folder / name), *NAMED)

    assert refused.exit_code == 2
    assert name in refused.output
