"""Files with secrets: their permissions, files planted in their place, and redirections by `.env`."""

import os
import shutil
import signal
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.server import Server
from tests.e2e.hostile.support import Victim, victim
from tests.support.command import ROSTER, Ended, run, serving, waiting_to_serve
from tests.support.rows import add_users
from tests.support.server import serve

OTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


usual_and_no_umask = pytest.mark.parametrize("umask", [0o022, 0], indirect=True)


@pytest.fixture(autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start processes with a umask, by default 0."""
    before = os.umask(getattr(request, "param", 0))
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that only its owner can write to."""
    (tmp_path / "files").mkdir(0o755)
    return tmp_path / "files"


def modes(folder: Path, pattern: str = "*") -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.glob(pattern)}


@usual_and_no_umask
async def test_serve_creates_database_for_its_owner_only(folder: Path) -> None:
    """So are the files that SQLite adds; there is no warning."""
    async with serving(folder, ROSTER_DATABASE_URL="sqlite:///roster.db") as server:
        found = modes(folder)
        server.signal(signal.SIGTERM)
        said = (await server.ended()).err

    assert found == dict.fromkeys(["roster.db", "roster.db-wal", "roster.db-shm"], 0o600)
    assert "other users" not in said


@pytest.mark.parametrize(
    "url", ["sqlite:///roster.db", "sqlite:///link.db", "sqlite:///file:roster.db?uri=true"]
)
async def test_migrate_creates_database_for_its_owner_only(folder: Path, url: str) -> None:
    """Also through a symlink."""
    (folder / "link.db").symlink_to("roster.db")

    ended = await run(ROSTER, "migrate", folder=folder, ROSTER_DATABASE_URL=url)

    assert (ended.status, modes(folder, "roster.db*")) == (0, {"roster.db": 0o600})


async def test_exposed_database_is_reported_and_not_changed(folder: Path) -> None:
    """The warning has the command that closes it, because it can be intended."""
    settings: dict[str, Any] = {"ROSTER_DATABASE_URL": "sqlite:///roster.db", "ROSTER_LOG_FORMAT": "text"}
    await run(ROSTER, "migrate", folder=folder, **settings)
    (folder / "roster.db").chmod(0o644)
    folder.chmod(0o777)  # noqa: ASYNC240

    examined = await run(ROSTER, "doctor", folder=folder, **settings)
    async with waiting_to_serve(folder, **settings) as server:
        await server.said("run: chmod 600 roster.db")
        await server.said(f"other users can create files in {folder}")

    assert examined.status == 1
    assert "run: chmod 600 roster.db" in examined.out
    assert f"other users can create files in {folder}" in examined.out
    assert modes(folder)["roster.db"] == 0o644


@pytest.fixture
async def server(sqlite_url: str) -> AsyncIterator[Server]:
    """A server with some users."""
    async with serve(sqlite_url) as server:
        await add_users(server.database, 3)
        yield server


async def export(server: Server, folder: Path, output: str, *options: str) -> Ended:
    command = ("export", "users", "--output", output, "--format", "ndjson", *options)
    return await run(ROSTER, *command, folder=folder, ROSTER_ADDRESS=server.address)


@pytest.mark.parametrize("name", ["users.ndjson", "users.ndjson.gz"])
@pytest.mark.parametrize("planted", [None, "symlink", "hard link", "file"])
async def test_export_does_not_follow_planted_files(
    server: Server, folder: Path, name: str, planted: str | None
) -> None:
    """At the path of its `.part` file; only a name is replaced."""
    precious, part = folder.parent / "precious", folder / f"{name}.part"
    precious.write_text("precious")
    if planted == "symlink":
        part.symlink_to(precious)
    elif planted == "hard link":
        part.hardlink_to(precious)
    elif planted:
        part.write_text("of an export that was killed")
        part.chmod(0o666)

    ended = await export(server, folder, name)

    assert (ended.status, precious.read_text(), modes(folder)) == (0, "precious", {name: 0o600})


@usual_and_no_umask
async def test_export_replaces_a_symlink_and_not_its_target(server: Server, folder: Path) -> None:
    """As a rename does."""
    (folder / "users.ndjson").symlink_to(folder / "elsewhere")
    (folder / "elsewhere").write_text("precious")

    ended = await export(server, folder, "users.ndjson")

    assert (ended.status, (folder / "elsewhere").read_text()) == (0, "precious")
    assert modes(folder)["users.ndjson"] == 0o600


@pytest.mark.parametrize("output", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("redirected", ["| cat", "> file; cat file"])
async def test_export_to_standard_output_does_not_replace_it(
    server: Server, folder: Path, output: str, redirected: str
) -> None:
    """By each of its names, whether it is a pipe or a file."""
    script = f"{ROSTER} export users --format ndjson -o {output} {redirected}"

    ended = await run("bash", "-c", script, folder=folder, ROSTER_ADDRESS=server.address)

    assert len(ended.out.splitlines()) == 3
    assert Path("/dev/stdout").is_symlink()  # noqa: ASYNC240


async def test_writes_to_a_named_pipe(server: Server, folder: Path) -> None:
    """Exports and rejects can go to another program."""
    os.mkfifo(folder / "pipe")
    (folder / "users.csv").write_text("email\nnobody\n")
    script = "cat pipe & {} ; wait"
    exported = f"{ROSTER} export users --format ndjson -o pipe"
    loaded = f"{ROSTER} load users users.csv --rejects pipe"

    first = await run("bash", "-c", script.format(exported), folder=folder, ROSTER_ADDRESS=server.address)
    second = await run("bash", "-c", script.format(loaded), folder=folder, ROSTER_ADDRESS=server.address)

    assert len(first.out.splitlines()) == 3
    assert "_error,email" in second.out
    assert stat.S_ISFIFO((folder / "pipe").lstat().st_mode)


@pytest.mark.parametrize("planted", [None, "symlink", "dangling symlink"])
async def test_rejects_are_private_and_follow_no_symlink(
    server: Server, folder: Path, planted: str | None
) -> None:
    """They contain the passwords of failed rows."""
    (folder / "users.csv").write_text("email,password\nnobody,secret\n")
    (precious := folder.parent / "precious").write_text("precious")
    if planted:
        leads_to = precious if planted == "symlink" else folder.parent / "missing"
        (folder / "users.rejects.csv").symlink_to(leads_to)

    ended = await run(ROSTER, "load", "users", "users.csv", folder=folder, ROSTER_ADDRESS=server.address)

    name = "users.rejects.2.csv" if planted else "users.rejects.csv"
    assert (ended.status, precious.read_text()) == (1, "precious")
    assert not (folder.parent / "missing").exists()
    assert modes(folder)[name] == 0o600
    assert "nobody,secret" in (folder / name).read_text()


@usual_and_no_umask
async def test_keys_are_private_and_follow_no_symlink(folder: Path) -> None:
    """The folder is readable, for the public key, and only its owner can write to it."""
    made = await run(ROSTER, "token", "keys", "keys", folder=folder)
    (folder / "planted").mkdir()
    (folder / "planted/private.pem").symlink_to(folder.parent / "elsewhere")
    refused = await run(ROSTER, "token", "keys", "planted", folder=folder)

    assert (made.status, refused.status) == (0, 2)
    assert modes(folder / "keys")["private.pem"] == 0o600
    assert not modes(folder / "keys")["jwks.json"] & 0o022
    assert not modes(folder)["keys"] & 0o022
    assert not (folder.parent / "elsewhere").exists()


@dataclass(frozen=True)
class Folder:
    """A folder received from somebody, and a server that requires a token."""

    path: Path
    server: Victim

    def write(self, *variables: str) -> None:
        (self.path / ".env").write_text("".join(f"{variable}\n" for variable in variables))
        (self.path / ".env").chmod(0o644)

    async def loads(self, *options: str, **environment: str) -> Ended:
        return await run(ROSTER, "loads", *options, folder=self.path, stdin=b"", **environment)


@pytest.fixture
async def handed(tmp_path: Path, folder: Path) -> AsyncIterator[Folder]:
    (tmp_path / "server").mkdir()
    async with victim(tmp_path / "server", f"sqlite:///{tmp_path}/server/roster.db") as server:
        for place in (folder, tmp_path):
            (place / "token").write_text(server.token("admin"))
            shutil.copy(server.ca, place / "ca.pem")
        yield Folder(folder, server)


async def test_foreign_token_is_not_sent_to_server_of_a_folder(handed: Folder) -> None:
    """If `.env` names the address or the CA, the error names the options that confirm them."""
    address, ca, token = handed.server.address, "ca.pem", handed.server.token("admin")
    handed.write(f"ROSTER_ADDRESS={address}", f"ROSTER_TLS_CA_FILE={ca}")
    outside = str(handed.path.parent / "token")

    refused = [
        await handed.loads(ROSTER_TOKEN=token),
        await handed.loads(ROSTER_TOKEN_FILE=outside),
        await handed.loads("--token-file", outside),
        await handed.loads("--address", address, ROSTER_TOKEN=token),
        await handed.loads("--tls-ca", ca, ROSTER_TOKEN=token),
    ]
    wanted = await handed.loads("--address", address, "--tls-ca", ca, ROSTER_TOKEN=token)
    handed.write("ROSTER_ADDRESS=127.0.0.1:1")
    overridden = await handed.loads(ROSTER_ADDRESS=address, ROSTER_TLS_CA_FILE=ca, ROSTER_TOKEN=token)

    assert [ended.status for ended in refused] == [2] * 5
    assert all("in the .env of this directory" in ended.err and token not in ended.err for ended in refused)
    assert "pass --address and --tls-ca" in refused[0].err
    assert (wanted.status, wanted.err, overridden.status) == (0, "", 0)


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("ROSTER_TLS_SERVER_NAME=localhost", "pass --tls-server-name, or"),
        ("ROSTER_INSECURE_TOKEN=true", "pass --insecure-token, or"),
    ],
)
async def test_folder_does_not_weaken_the_check_of_the_server(
    handed: Folder, variable: str, option: str
) -> None:
    """Another name, or no TLS at all, would give the token to somebody else, even at a given address."""
    token = handed.server.token("admin")
    handed.write(variable)

    refused = await handed.loads("--address", handed.server.address, "--tls-ca", "ca.pem", ROSTER_TOKEN=token)

    assert refused.status == 2
    assert option in refused.err
    assert token not in refused.err


async def test_folder_can_have_its_server_and_its_token(handed: Folder) -> None:
    """As a value or a file in it, but neither an outside file nor an environment variable."""
    token, named = handed.server.token("admin"), [f"ROSTER_ADDRESS={handed.server.address}"]
    named.append("ROSTER_TLS_CA_FILE=ca.pem")
    handed.write(*named, f"ROSTER_TOKEN={token}")
    by_value = await handed.loads()
    handed.write(*named, "ROSTER_TOKEN_FILE=token")
    by_file = await handed.loads()
    handed.write(*named, f"ROSTER_TOKEN_FILE={handed.path.parent}/token")
    from_elsewhere = await handed.loads()
    (handed.path / "link").symlink_to(handed.path.parent / "token")
    handed.write(*named, "ROSTER_TOKEN_FILE=link")
    by_link = await handed.loads()
    handed.write(*named, "ROSTER_TOKEN=${SECRET}")
    expanded = await handed.loads(SECRET=token)

    assert (by_value.status, by_file.status) == (0, 0)
    assert (from_elsewhere.status, by_link.status) == (2, 2)
    assert expanded.status == 2
    assert "a valid token or client certificate is required" in expanded.err


@pytest.mark.parametrize("command", ["serve", "migrate", "doctor"])
async def test_database_of_a_folder_gets_no_foreign_password(folder: Path, command: str) -> None:
    """PostgreSQL's libpq sends PGPASSWORD to whatever server the URL names."""
    (folder / ".env").write_text("DATABASE_URL=postgresql://ada@127.0.0.1:1/roster\n")
    (folder / ".env").chmod(0o600)

    ended = await run(ROSTER, command, folder=folder, PGPASSWORD="secret")

    assert ended.status in (1, 2)
    assert "PGPASSWORD of the environment would be sent" in ended.out + ended.err


async def test_env_file_writable_by_others_is_refused(folder: Path) -> None:
    """It could redirect every user who works in a shared folder."""
    (folder / ".env").write_text("ROSTER_ADDRESS=127.0.0.1:1\n")
    (folder / ".env").chmod(0o666)

    ended = await run(ROSTER, "loads", folder=folder)

    assert (ended.status, ended.err) == (
        2,
        f"Error: other users can change {folder}/.env; run: chmod go-w .env\n",
    )


@as_root
async def test_env_file_of_another_user_is_refused(folder: Path) -> None:
    """As in a folder for temporary files."""
    (folder / ".env").write_text("ROSTER_ADDRESS=127.0.0.1:1\n")
    (folder / ".env").chmod(0o644)
    os.chown(folder / ".env", OTHER_USER, OTHER_USER)

    ended = await run(ROSTER, "loads", folder=folder)

    assert ended.status == 2
    assert f"{folder}/.env belongs to another user" in ended.err
