"""`roster doctor`, and the completion of shells."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.authority import DAY, Authority
from tests.e2e.command import ROSTER, Ended, run


async def doctor(folder: Path, **environment: Any) -> Ended:
    """What it says of some settings; any number of servers may be there."""
    return await run(ROSTER, "doctor", folder=folder, **{"ROSTER_LISTEN": "127.0.0.1:0", **environment})


async def test_all_is_well(postgresql_url: str, tmp_path: Path) -> None:
    """Each thing that was looked at is told, without colours where nobody sees them, and no password."""
    url = postgresql_url.replace("postgres@", "postgres:secret@")
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=url)

    assert (ended.status, ended.err) == (0, "")
    looked_at = [line.split()[:2] for line in ended.out.splitlines()]
    assert looked_at == [["ok", "settings"], ["ok", "database"], ["ok", "schema"], ["ok", "clock"]]
    assert "secret" not in ended.out
    assert "\x1b" not in ended.out


async def test_nothing_is_made_where_nothing_is_yet(tmp_path: Path) -> None:
    """To look is not to serve."""
    ended = await doctor(tmp_path)

    assert (ended.status, os.listdir(tmp_path)) == (0, [])  # noqa: PTH208  (a Path would block)


async def test_all_wrong_settings_are_told(tmp_path: Path) -> None:
    """With status 1, as for all that is wrong."""
    ended = await doctor(tmp_path, ROSTER_GRACE="-1", ROSTER_POOL_SIZE="many")

    assert ended.status == 1
    assert ended.out.startswith("wrong  settings  ")
    assert ["ROSTER_GRACE:" in ended.out, "ROSTER_POOL_SIZE:" in ended.out] == [True, True]


async def test_unknown_settings_are_told(tmp_path: Path) -> None:
    """Wherever they stand, with the one that may be meant; those of clients and of others are known."""
    (tmp_path / ".env").write_text("ROSTER_POOL_SIZES=3\n")
    known = {"ROSTER_ADDRESS": "x", "ROSTER_TOKEN": "x", "ROSTER_TLS_CA_FILE": "x", "ROSTER_TEST_SEED": "1"}
    known |= {"ROSTER_PORT_50051_TCP": "x", "ROSTER_GRACE_FILE": "/dev/null", "ROSTER_GRACE": "3"}
    known |= {"ROSTER_TLS_CERT_FILE": "", "ROSTER_POLICY_FILE": ""}
    ended = await doctor(tmp_path, ROSTER_LISEN="x", **known)

    told = [line for line in ended.out.splitlines() if "unknown setting" in line]
    assert told == [
        "wrong  settings  unknown setting ROSTER_LISEN; did you mean ROSTER_LISTEN?",
        "wrong  settings  unknown setting ROSTER_POOL_SIZES; did you mean ROSTER_POOL_SIZE?",
    ]
    assert ended.status == 1


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    """It is right where the server runs already."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = await doctor(tmp_path, ROSTER_LISTEN=address)

    assert ended.status == 0
    assert f"ok     port      {address} is taken: does the server run already?" in ended.out


async def test_too_many_connections_are_told(postgresql_url: str, tmp_path: Path) -> None:
    """Those of all workers, of which the database keeps some for superusers."""
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=postgresql_url, ROSTER_WORKERS="1000")

    assert ended.status == 1
    assert "wrong  database  up to 25000 connections are opened, and it has " in ended.out


async def test_a_database_that_is_away_is_told(tmp_path: Path) -> None:
    """At once: nobody waits for it here."""
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL="postgresql://x@127.0.0.1:1/roster")

    assert ended.status == 1
    assert "wrong  database  it can't be reached" in ended.out


@pytest.mark.parametrize(
    ("revision", "advice"), [("0001", "run `roster migrate`"), ("9999", "newer than this release")]
)
async def test_another_schema_is_told(
    revision: str, advice: str, postgresql_url: str, tmp_path: Path
) -> None:
    """One that is behind needs a migration, one that is ahead a newer release."""
    engine = create_async_engine(postgresql_url)
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    await engine.dispose()
    ended = await doctor(tmp_path, ROSTER_DATABASE_URL=postgresql_url)

    assert ended.status == 1
    (told,) = (line for line in ended.out.splitlines() if line.startswith("wrong  schema"))
    assert advice in told


async def test_a_shell_completes_the_commands(tmp_path: Path) -> None:
    """By what `roster completion` prints, which asks the command."""
    script = await run(ROSTER, "completion", "zsh", folder=tmp_path)
    assert "_ROSTER_COMPLETE=zsh_complete" in script.out

    asked: dict[str, Any] = {
        "_ROSTER_COMPLETE": "bash_complete",
        "COMP_WORDS": "roster lo",
        "COMP_CWORD": "1",
    }
    completed = await run(ROSTER, folder=tmp_path, **asked)
    assert completed.out.splitlines() == ["plain,load", "plain,loads"]


async def test_files_of_tls_and_rights_are_looked_at(tmp_path: Path) -> None:
    """A certificate that has expired, a key that is another's, a policy that nobody can read."""
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
    well = await doctor(tmp_path, **files)
    (tmp_path / "key.pem").write_bytes(authority.issue("localhost").key)
    policy.write_text("who?")
    wrong = await doctor(tmp_path, **files)

    assert (expired.status, well.status, wrong.status) == (1, 0, 1)
    assert "wrong  tls       the certificate expired on" in expired.out
    assert "ok     tls       the certificate is good until" in well.out
    assert f"ok     rights    {policy} says who may do what" in well.out
    assert "the first certificate does not match the key" in wrong.out
    assert "wrong  rights    can't use" in wrong.out
