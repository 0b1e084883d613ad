"""`roster doctor`, and shell completion."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support.authority import DAY, Authority
from tests.support.command import ROSTER, SERVER_DEFAULTS, Ended, run


async def doctor(folder: Path, **environment: Any) -> Ended:
    """Run the command with these settings, on a free port and without metrics, as a server may be running."""
    return await run(ROSTER, "doctor", folder=folder, **{**SERVER_DEFAULTS, **environment})


async def test_reports_each_check(postgresql_url: str, tmp_path: Path) -> None:
    """Without colours in a pipe, and without passwords."""
    url = postgresql_url.replace("postgres@", "postgres:secret@")
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=url)

    assert (ended.status, ended.err) == (0, "")
    checks = [line.split()[:2] for line in ended.out.splitlines()]
    assert checks == [["ok", "settings"], ["ok", "database"], ["ok", "schema"], ["ok", "clock"]]
    assert "secret" not in ended.out
    assert "\x1b" not in ended.out


async def test_creates_no_database(tmp_path: Path) -> None:
    """A check changes nothing."""
    ended = await doctor(tmp_path)

    assert (ended.status, os.listdir(tmp_path)) == (0, [])  # noqa: PTH208  (a Path would block)


async def test_reports_all_invalid_settings(tmp_path: Path) -> None:
    """All are reported at once, with status 1."""
    ended = await doctor(tmp_path, ROSTER_GRACE="-1", ROSTER_POOL_SIZE="many")

    assert ended.status == 1
    assert ended.out.startswith("FAIL  settings  ")
    assert "ROSTER_GRACE should be greater than 0\n" in ended.out
    assert "ROSTER_POOL_SIZE should be a valid integer" in ended.out


async def test_reports_unknown_settings(tmp_path: Path) -> None:
    """With a suggestion if a name is similar; variables of clients, tests and Kubernetes are known."""
    (tmp_path / ".env").write_text("ROSTER_POOL_SIZES=3\n")
    known = {"ROSTER_ADDRESS": "x", "ROSTER_TOKEN": "x", "ROSTER_TLS_CA_FILE": "x", "ROSTER_TEST_SEED": "1"}
    known |= {"ROSTER_PORT_50051_TCP": "x", "ROSTER_GRACE_FILE": "/dev/null", "ROSTER_GRACE": "3"}
    known |= {"ROSTER_TLS_CERT_FILE": "", "ROSTER_POLICY_FILE": ""}
    ended = await doctor(tmp_path, ROSTER_FOO="x", ROSTER_LISEN="x", **known)

    unknown = [line for line in ended.out.splitlines() if "unknown setting" in line]
    assert unknown == [
        "FAIL  settings  unknown setting ROSTER_FOO",
        "FAIL  settings  unknown setting ROSTER_LISEN; did you mean ROSTER_LISTEN?",
        "FAIL  settings  unknown setting ROSTER_POOL_SIZES; did you mean ROSTER_POOL_SIZE?",
    ]
    assert ended.status == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PGHOST": "db"},
        {"DB_URL": "postgresql://db/roster"},
        {"ROSTER_DB_URL": "postgresql://db/roster"},
        {"ROSTER_GRACE": "0"},
    ],
)
async def test_settings_are_not_ok_if_one_of_them_fails(environment: dict[str, str], tmp_path: Path) -> None:
    """Two lines that contradict each other would say nothing."""
    ended = await doctor(tmp_path, **environment)

    assert ended.status == 1
    assert "FAIL  settings  " in ended.out
    assert "ok    settings  " not in ended.out


async def test_warns_about_parameters_that_are_not_honoured(postgresql_url: str, tmp_path: Path) -> None:
    """A check that has passed is something else."""
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=f"{postgresql_url}?pgbouncer=true")

    assert ended.status == 0
    assert "warn  database  " in ended.out


async def test_reports_a_port_in_use(tmp_path: Path) -> None:
    """That is a warning, not a failure: the server may be running."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = await doctor(tmp_path, ROSTER_LISTEN=address)

    assert ended.status == 0
    assert f"warn  port      {address} is in use, maybe by the running server" in ended.out


async def test_reports_too_many_connections(postgresql_url: str, tmp_path: Path) -> None:
    """It counts those of all workers; the database reserves some for superusers."""
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=postgresql_url, ROSTER_WORKERS="1000")

    assert ended.status == 1
    assert "FAIL  database  the server may open 25000 connections, but the database allows " in ended.out


async def test_reports_an_unreachable_database(tmp_path: Path) -> None:
    """It fails at once, without waiting for the database."""
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL="postgresql://x@127.0.0.1:1/roster")

    assert ended.status == 1
    assert "FAIL  database  the database can't be reached" in ended.out


@pytest.mark.parametrize(
    ("revision", "advice"), [("0001", "run `roster migrate`"), ("9999", "newer than this release")]
)
async def test_reports_another_schema(
    revision: str, advice: str, postgresql_url: str, tmp_path: Path
) -> None:
    """An older schema needs a migration, a newer one a newer release."""
    engine = create_async_engine(postgresql_url)
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE roster_schema SET version_num = '{revision}'"))
        await connection.execute(text(f"UPDATE schema_compatibility SET min_revision = '{revision}'"))
    await engine.dispose()
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=postgresql_url)

    assert ended.status == 1
    (failure,) = (line for line in ended.out.splitlines() if line.startswith("FAIL  schema"))
    assert advice in failure


async def test_completes_commands_in_a_shell(tmp_path: Path) -> None:
    """The script of `roster completion` asks the command for completions."""
    script = await run(ROSTER, "completion", "zsh", folder=tmp_path)
    assert "_ROSTER_COMPLETE=zsh_complete" in script.out

    request: dict[str, Any] = {
        "_ROSTER_COMPLETE": "bash_complete",
        "COMP_WORDS": "roster lo",
        "COMP_CWORD": "1",
    }
    completed = await run(ROSTER, folder=tmp_path, **request)
    assert completed.out.splitlines() == ["plain,load", "plain,loads"]


async def test_checks_tls_and_policy_files(tmp_path: Path) -> None:
    """It reports an expired certificate, the key of another one, and an invalid policy."""
    authority = Authority()
    authority.issue("localhost", valid_for=-DAY).write(tmp_path)
    policy = tmp_path / "policy.toml"
    policy.write_text("[identities]\n")
    files = {
        "ROSTER_TLS_CERT_FILE": tmp_path / "cert.pem",
        "ROSTER_TLS_KEY_FILE": tmp_path / "key.pem",
        "ROSTER_TLS_CLIENT_CA_FILE": authority.write(tmp_path),
        "ROSTER_POLICY_FILE": policy,
    }
    expired = await doctor(tmp_path, **files)
    authority.issue("localhost").write(tmp_path)
    valid = await doctor(tmp_path, **files)
    (tmp_path / "key.pem").write_bytes(authority.issue("localhost").key)
    policy.write_text("who?")
    invalid = await doctor(tmp_path, **files)

    assert (expired.status, valid.status, invalid.status) == (1, 0, 1)
    assert "FAIL  tls       the certificate expired on" in expired.out
    assert "ok    tls       the certificate is valid until" in valid.out
    assert f"ok    policy    {policy} is valid" in valid.out
    assert "the first certificate does not match the key" in invalid.out
    assert "FAIL  policy    can't use" in invalid.out
