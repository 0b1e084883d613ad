"""`roster load` as a person runs it: a process of its own against a real server."""

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from roster.v1.users_pb2 import GetUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server

COMMAND = "from service.cli.load import load; load(prog_name='roster load')"

# The rows are in before the command learns it.
MOST_IN = "(250|500|750|1,000) rows are in and durable, 0 failed\n"


@dataclass
class Ended:
    """How the command ended."""

    status: int | None
    out: str
    err: str


class Loader:
    """Runs the command in a folder of the test's own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start `roster load` with these arguments."""
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            COMMAND,
            *arguments,
            cwd=self.folder,
            env={**os.environ, "ROSTER_ADDRESS": self.address},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str, stdin: bytes = b"") -> Ended:
        """Run it to its end."""
        process = await self.start(*arguments)
        out, err = await process.communicate(stdin)
        return Ended(process.returncode, out.decode(), err.decode())

    def write(self, name: str, *rows: object) -> str:
        """Write a file of rows, and return its name."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))
        return name

    def rejects(self, name: str) -> list[dict[str, object]]:
        """Return the rows of a file of rejects."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command does not know which it is."""
    return sqlite_url


@pytest.fixture
def loader(server: Server, tmp_path: Path) -> Loader:
    """The command, with a server to load into."""
    folder = tmp_path / "files"
    folder.mkdir()
    return Loader(folder, server.address)


async def test_loads_users_and_their_posts(loader: Loader, users: UserServiceStub) -> None:
    """All rows in is status 0; the sentence at the end counts them."""
    names = [{"email": f"{number}@example.org", "created_at": "2024-01-01", "foo": 1} for number in range(12)]
    posts = [{"title": "t", "author_email": f"{number}@example.org"} for number in range(12)]

    first = await loader.run("users", loader.write("users.ndjson", *names), "--batch-rows", "5")
    second = await loader.run("posts", loader.write("posts.ndjson", *posts))

    assert (first.status, second.status) == (0, 0)
    assert first.out.startswith("users.ndjson: 12 rows in ")
    assert first.out.endswith(": 12 created, 0 updated, 0 skipped, 0 failed\n")
    assert "ignored columns: created_at, foo\n" in first.err
    assert [user.email for user in (await users.ListUsers(ListUsersRequest())).users] == [
        f"{number}@example.org" for number in range(12)
    ]


async def test_rejects_can_be_mended_and_loaded(loader: Loader, users: UserServiceStub) -> None:
    """A load with failed rows is status 1; what failed, here and there, is in one file, in order."""
    name = loader.write(
        "users.ndjson", {"email": "a@example.org"}, {"email": 7}, {"email": "no address"}, "what?"
    )

    first = await loader.run("users", name)
    rejects = loader.rejects("users.rejects.ndjson")
    mended = loader.write("mended.ndjson", *({**row, "email": f"{i}@x.org"} for i, row in enumerate(rejects)))
    second = await loader.run("users", mended)

    assert first.status == 1
    assert "1 created, 0 updated, 0 skipped, 3 failed\n" in first.out
    assert "the failed rows are in users.rejects.ndjson\n" in first.out
    assert [(row["_error"]["row"], row["_error"]["field"]) for row in rejects] == [  # type: ignore[index]
        (2, "email"),
        (3, "email"),
        (4, ""),
    ]
    assert (second.status, "_error" in second.err) == (0, False)
    assert (await users.GetUser(GetUserRequest(email="2@x.org"))).version == 1


async def test_takes_csv_from_standard_input(loader: Loader, users: UserServiceStub) -> None:
    """The dash is standard input, whose format has to be said."""
    rows = b"email,full_name,is_active\na@example.org,Ada,false\nb@example.org,,maybe\n"

    ended = await loader.run("users", "-", "--format", "csv", stdin=rows)

    assert ended.status == 1
    assert ended.out.startswith("stdin: 2 rows in ")
    assert (loader.folder / "stdin.rejects.csv").read_text() == (
        "_error,email,full_name,is_active\n"
        "INVALID_FIELD is_active: is_active must be true or false,b@example.org,,maybe\n"
    )
    assert (await users.GetUser(GetUserRequest(email="a@example.org"))).full_name == "Ada"


async def test_on_conflict_update_writes_the_mask(loader: Loader, users: UserServiceStub) -> None:
    """Users who exist get the fields that are named."""
    name = loader.write("users.ndjson", {"email": "a@example.org", "full_name": "Ada", "is_active": False})
    await loader.run("users", loader.write("first.ndjson", {"email": "a@example.org"}))

    ended = await loader.run("users", name, "--on-conflict", "update", "--update-mask", "full_name", "--json")

    user = await users.GetUser(GetUserRequest(email="a@example.org"))
    assert json.loads(ended.out)["updated"] == 1
    assert (user.full_name, user.is_active) == ("Ada", True)


async def test_the_summary_for_programs_is_one_object(loader: Loader) -> None:
    """It has the counts, the reasons and where the rejects are."""
    name = loader.write("users.ndjson", {"email": "a@example.org"}, {"email": "a@example.org"}, {})

    ended = await loader.run("users", name, "--json", "--rejects", "bad.ndjson")

    summary = json.loads(ended.out)
    assert summary.pop("seconds") > 0
    assert summary == {
        "file": "users.ndjson",
        "rows": 3,
        "created": 1,
        "updated": 0,
        "skipped": 0,
        "failed": 2,
        "reasons": {"EMAIL_TAKEN": 1, "INVALID_FIELD": 1},
        "rejects": "bad.ndjson",
    }


async def test_validate_only_writes_nothing(loader: Loader, users: UserServiceStub) -> None:
    """It says so, too."""
    ended = await loader.run(
        "users", loader.write("users.ndjson", {"email": "a@example.org"}), "--validate-only"
    )

    assert "nothing was written" in ended.out
    assert not (await users.ListUsers(ListUsersRequest())).users


@pytest.mark.parametrize("rows", [["what?"] * 5, [{"email": "no address"}] * 5])
async def test_stops_where_too_many_rows_failed(loader: Loader, rows: list[object]) -> None:
    """Rows that can't be read count like those that the server refuses."""
    ended = await loader.run("users", loader.write("users.ndjson", *rows), "--max-failures", "4")

    assert (ended.status, ended.out) == (2, "")
    assert "rows failed" in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["users", "missing.ndjson"], "'missing.ndjson' does not exist"),
        (["users", "users.txt"], "add --format ndjson or csv"),
        (["users", "users.ndjson", "--on-conflict", "update"], "--update-mask is needed"),
        (["users", "users.ndjson", "--rejects", "./users.ndjson"], "is the file to load"),
        (["users", "users.ndjson", "--rejects", "nowhere/rejects"], "there is no folder nowhere"),
        (["users", "users.ndjson", "--format", "csv"], "names none of email"),
        (["users", "users.ndjson", "--address", "127.0.0.1:1"], "127.0.0.1:1; start one with `roster serve`"),
        (
            ["posts", "users.ndjson", "--on-conflict", "skip"],
            "the server refused the load: options.on_conflict",
        ),
    ],
)
async def test_says_why_it_can_not_run(loader: Loader, arguments: list[str], told: str) -> None:
    """Status 2 and one sentence; nothing is written, and no traceback is shown."""
    loader.write("users.ndjson", {"email": "a@example.org"})
    loader.write("users.txt")

    ended = await loader.run(*arguments)

    assert (ended.status, ended.out) == (2, "")
    assert told in " ".join(ended.err.split())
    assert "Traceback" not in ended.err


@pytest.fixture
async def waiting(loader: Loader, users: UserServiceStub) -> asyncio.subprocess.Process:
    """The command with 1,000 rows in, and a standard input that says no more."""
    process = await loader.start("users", "-", "--batch-rows", "250")
    assert process.stdin
    process.stdin.write(b"".join(b'{"email": "%d@example.org"}\n' % number for number in range(1000)))
    while len((await users.ListUsers(ListUsersRequest(page_size=1000))).users) < 1000:
        assert process.returncode is None
    return process


async def test_an_interrupt_says_what_is_in(waiting: asyncio.subprocess.Process) -> None:
    """Ctrl-C ends a load at once, with status 130."""
    waiting.send_signal(signal.SIGINT)

    _, err = await waiting.communicate()

    assert waiting.returncode == 130
    assert re.fullmatch(f"interrupted: {MOST_IN}", err.decode())


async def test_a_server_that_goes_away_is_told_with_what_is_in(
    waiting: asyncio.subprocess.Process, server: Server
) -> None:
    """Status 2, and no traceback."""
    await server.stop(grace=0)

    _, err = await waiting.communicate()

    assert waiting.returncode == 2
    assert re.search(f"Error: stdin: the load stopped: .*; {MOST_IN}", err.decode())
