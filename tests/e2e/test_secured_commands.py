"""The command `roster` with TLS and tokens, as a server and as a client."""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.e2e.clients import CHECKOUT
from tests.e2e.secured import Secured, secured
from tests.e2e.test_readme import PATH
from tests.support.authority import Authority
from tests.support.command import ROSTER, Ended, ended, run, serving, start
from tests.support.issuer import AUDIENCE, ISSUER, Issuer
from tests.support.server import serve

PAGE = CHECKOUT / "docs/security.md"
POLICY = '[identities]\n"jwt:ada" = ["admin"]\n'


@asynccontextmanager
async def run_script(script: str, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run lines in a shell, and end the processes that they have started."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-ec", script),
        cwd=folder,
        env={**os.environ, "PATH": PATH, "ROSTER_DATABASE_URL": "sqlite:///roster.db"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    await process.communicate()


async def test_documented_commands_serve_beyond_this_machine(tmp_path: Path) -> None:
    """The commands of the page run as they are, except for the address."""
    if not (shutil.which("openssl") and shutil.which("grpcurl", path=PATH)):
        pytest.skip("openssl or grpcurl is missing, so the page was not checked")
    setup, use = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[:2]
    async with run_script(setup.replace("0.0.0.0:50051", "127.0.0.1:0"), tmp_path) as server:
        assert server.stderr
        said = [line.decode() async for line in until(b"listening on ", server.stderr)]
        address = said[-1].split()[-1]
        async with run_script(use.replace("127.0.0.1:50051", address), tmp_path) as client:
            out, err = await client.communicate()

    assert (client.returncode, err.decode()) == (0, "0 users, 0 rows/s\n")
    assert "roster.v1.UserService" in out.decode().splitlines()


async def until(words: bytes, lines: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield lines up to the one with these words."""
    async for line in lines:
        yield line
        if words in line:
            return


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("cert.pem", b"nothing", "Unable to load PEM"),
        ("key.pem", Authority().issue("127.0.0.1").key, "the first certificate does not match the key"),
        ("ca.pem", b"nothing", "Unable to load PEM"),
        ("policy.toml", b'[identities]\n"jwt:ada" = ["raeder"]', "jwt:ada has unknown roles: raeder"),
        ("policy.toml", None, "No such file"),
    ],
)
async def test_an_unusable_file_keeps_the_server_from_starting(
    name: str, content: bytes | None, sentence: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The error names the file and the reason."""
    settings = protection(tmp_path)
    (tmp_path / name).write_bytes(content) if content else (tmp_path / name).unlink()

    with pytest.raises(OSError, match=f"can't use .*{name}.*{sentence}"):
        async with serve(sqlite_url, **settings):
            pass


def protection(folder: Path) -> dict[str, Any]:
    """Write TLS and policy files, and return the settings for them."""
    (authority := Authority()).issue("127.0.0.1").write(folder)
    authority.write(folder)
    (folder / "policy.toml").write_text(POLICY)
    return {
        "tls_cert_file": folder / "cert.pem",
        "tls_key_file": folder / "key.pem",
        "tls_client_ca_file": folder / "ca.pem",
        "policy_file": folder / "policy.toml",
    }


def behind_sidecar(folder: Path) -> dict[str, str]:
    """Write keys and a policy, and return the settings of a server whose TLS something else ends."""
    (folder / "policy.toml").write_text(POLICY)
    return {
        "ROSTER_JWT_ISSUER": ISSUER,
        "ROSTER_JWT_AUDIENCE": AUDIENCE,
        "ROSTER_JWT_KEYS_FILE": str(Issuer().write(folder)),
        "ROSTER_POLICY_FILE": "policy.toml",
    }


def nothing(_: Path) -> dict[str, str]:
    """Return no settings."""
    return {}


def tls_only(folder: Path) -> dict[str, str]:
    """Write a certificate, and return the settings of a server that authenticates nobody."""
    cert, key = Authority().issue("127.0.0.1").write(folder)
    return {"ROSTER_TLS_CERT_FILE": str(cert), "ROSTER_TLS_KEY_FILE": str(key)}


@pytest.mark.parametrize(
    ("protect", "listen", "warning"),
    [
        (nothing, "0.0.0.0:0", "without authentication, anyone who can reach 0.0.0.0:"),
        (tls_only, "0.0.0.0:0", "without authentication, anyone who can reach 0.0.0.0:"),
        (behind_sidecar, "0.0.0.0:0", "without TLS, tokens and rows can be read on the way to 0.0.0.0:"),
        (nothing, "127.0.0.1:0", None),
        (behind_sidecar, "127.0.0.1:0", None),
        (lambda folder: tls_only(folder) | behind_sidecar(folder), "0.0.0.0:0", None),
    ],
    ids=["nothing", "TLS alone", "tokens alone", "loopback", "tokens on loopback", "TLS and tokens"],
)
async def test_warning_says_what_is_not_in_force(
    protect: Callable[..., dict[str, str]], listen: str, warning: str | None, tmp_path: Path
) -> None:
    """ROSTER_INSECURE allows all of them; a warning names only what is missing."""
    settings = {"ROSTER_INSECURE": "true", "ROSTER_LISTEN": listen, **protect(tmp_path)}
    async with serving(tmp_path, **settings) as server:
        server.signal(signal.SIGTERM)
        said = (await server.ended()).err

    assert ("ROSTER_INSECURE: " in said) == bool(warning)
    assert warning is None or f"ROSTER_INSECURE: {warning}" in said


async def test_serve_reports_an_unusable_file_in_one_line(tmp_path: Path) -> None:
    """The status is 2, and no traceback is printed."""
    settings: dict[str, Any] = {
        f"ROSTER_{name.upper()}": str(path) for name, path in protection(tmp_path).items()
    }
    (tmp_path / "key.pem").write_bytes(b"nothing")
    refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN="127.0.0.1:0", **settings)

    assert refused.status == 2
    assert "key.pem" in refused.err.splitlines()[-1]
    assert "Traceback" not in refused.err


async def test_serve_refuses_to_let_everybody_in(tmp_path: Path) -> None:
    """The error names the settings that secure it, and the one that allows it anyway."""
    refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_LISTEN="0.0.0.0:0")

    assert refused.status == 2
    for name in ("TLS_CERT_FILE", "TLS_CLIENT_CA_FILE", "JWT_KEYS_FILE", "INSECURE=true"):
        assert f"ROSTER_{name}" in refused.err


@pytest.fixture
async def served(sqlite_url: str, tmp_path: Path) -> Any:
    """A server that requires a client certificate and accepts tokens."""
    async with secured(sqlite_url, tmp_path, client_ca=True, tokens=True) as server:
        yield server


async def command(server: Secured, *words: str, **environment: str) -> Ended:
    """Run the command as a client of the server."""
    process = await start(ROSTER, *words, folder=server.folder, ROSTER_ADDRESS=server.address, **environment)
    return await ended(process)


async def test_clients_take_files_from_options_or_the_environment(served: Secured) -> None:
    """These are CA, certificate, key, and a token from a file or a variable."""
    (served.folder / "client").mkdir()
    served.authority.issue("spiffe://example.org/prod/loads").write(served.folder / "client")
    (served.folder / "users.ndjson").write_text('{"email": "ada@example.org"}\n')
    (served.folder / "token").write_text(f"{served.issuer.token('reader')}\n")
    own = ["--tls-ca", "ca.pem", "--tls-cert", "client/cert.pem", "--tls-key", "client/key.pem"]
    variables = {
        "ROSTER_TLS_CA_FILE": "ca.pem",
        "ROSTER_TLS_CLIENT_CERT_FILE": "client/cert.pem",
        "ROSTER_TLS_CLIENT_KEY_FILE": "client/key.pem",
    }
    loaded = await command(served, "load", "users", "users.ndjson", *own)
    exported = await command(served, "export", "users", *own, "--token-file", "token")
    by_variable = await command(
        served, "export", "users", **variables, ROSTER_TOKEN=served.issuer.token("reader")
    )
    denied = await command(served, "export", "users", **variables, ROSTER_TOKEN=served.issuer.token("loader"))

    assert (loaded.status, loaded.err) == (0, "")
    assert "ada@example.org" in exported.out
    assert by_variable.out == exported.out
    assert (denied.status, denied.out) == (2, "")
    assert "the caller has no role that allows this" in denied.err


async def test_undo_needs_the_role_deleter(served: Secured) -> None:
    """A loader can't delete what its load created; a deleter undoes its own loads, without the role admin."""
    (served.folder / "users.ndjson").write_text('{"email": "ada@example.org"}\n')
    (served.folder / "client").mkdir()
    served.authority.issue("client.example.org").write(served.folder / "client")
    own = ["--tls-ca", "ca.pem", "--tls-cert", "client/cert.pem", "--tls-key", "client/key.pem"]
    loader, deleter = served.issuer.token("loader"), served.issuer.token("deleter")
    undo = ("loads", "undo", "staff", "--yes", *own)
    await command(served, "load", "users", "users.ndjson", "--load-id", "staff", *own, ROSTER_TOKEN=loader)

    denied = await command(served, *undo, ROSTER_TOKEN=loader)
    hidden = await command(served, *undo, ROSTER_TOKEN=deleter)
    async with served.server.database.begin() as session:
        await session.execute(text("UPDATE bulk_loads SET caller = 'jwt:deleter'"))
    done = await command(served, *undo, ROSTER_TOKEN=deleter)

    assert (denied.status, denied.out) == (2, "")
    assert "the caller has no role that allows this; nothing was deleted" in " ".join(denied.err.split())
    assert "there is no such load; nothing was deleted" in hidden.err
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("load staff created 1 user: 1 user deleted, 0 already gone, 0 kept\n")


async def test_a_token_is_not_sent_in_plain_text(served: Secured) -> None:
    """Without a CA, the command does not use TLS."""
    refused = await command(served, "loads", ROSTER_TOKEN=served.issuer.token("loader"))

    assert refused.status == 2
    assert "sent over TLS only" in refused.err
