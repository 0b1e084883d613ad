"""`roster export`, and `roster load --restore` of its files, as their own processes."""

import asyncio
import csv
import gzip
import io
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.db.engine import Database
from service.server import Server
from service.settings import Settings
from tests.support.command import ROSTER, Roster, ended, run
from tests.support.rows import add_posts, add_users
from tests.support.server import serve

NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
AWKWARD = [
    None,
    "",
    '"',
    '""',
    "\\N",
    "null",
    " a ",
    "a,b",
    "a\r\nb\rc\nd",
    "😀 é\u0085\u2028",
    "'; --",
    "x" * 255,
]
CONTENTS = [*AWKWARD[1:], "\x01" * (1 << 20), "😀" * (1 << 18), "\n" * (1 << 16)]
FIRST, LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)


async def fill(database: Database) -> None:
    """Store users and posts that are hard to serialize; ids have gaps, times have microseconds."""
    ids = [number * number * 7 for number in range(1, len(AWKWARD) + 1)]
    for number, (id, name) in enumerate(zip(ids, AWKWARD, strict=True)):
        user: dict[str, Any] = {"id": id, "email": f"é{number}@example.org", "full_name": name}
        user |= {"is_active": number % 2 == 0, "version": 1 + number**5, "updated_at": LAST}
        await add_users(database, **user, created_at=NOON + timedelta(microseconds=number))
    for number, content in enumerate(CONTENTS):
        post: dict[str, Any] = {"id": 1 + number * 1000, "title": AWKWARD[3 + number % 9], "content": content}
        post |= {"version": 1 + number, "created_at": FIRST, "updated_at": NOON - timedelta(days=number)}
        await add_posts(database, [ids[number % 5]], **post)


@asynccontextmanager
async def serving(url: str, folder: Path) -> AsyncIterator[Roster]:
    """Yield the command, as a client of a server on a database."""
    async with serve(url) as server:
        yield Roster(folder, server.address)


async def move(source: Roster, target: Roster, names: list[str]) -> None:
    """Export everything from one server, and restore it into another."""
    for entity, name in zip(("users", "posts"), names, strict=True):
        exported = await source.run("export", entity, "--output", name)
        assert (exported.status, exported.out) == (0, "")
        restored = await target.run("load", entity, str(source.folder / name), "--restore")
        assert (restored.status, restored.err) == (0, "")


@pytest.mark.parametrize("ending", ["ndjson", "csv.gz", "parquet"])
async def test_exports_are_restored_byte_for_byte(
    sqlite_url: str, postgresql_url: str, sqlite_template: Path, tmp_path: Path, ending: str
) -> None:
    """SQLite to PostgreSQL and back: the third database exports the same bytes as the first."""
    if ending == "parquet":
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    another_url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'another.db')}"
    database = Database(Settings(database_url=sqlite_url))
    await fill(database)
    await database.close()
    names = [f"users.{ending}", f"posts.{ending}"]
    async with AsyncExitStack() as stack:
        urls = [sqlite_url, postgresql_url, another_url]
        folders = [tmp_path / str(number) for number in range(3)]
        first, second, third = [
            await stack.enter_async_context(serving(url, folder))
            for url, folder in zip(urls, folders, strict=True)
        ]
        await move(first, second, names)
        await move(second, third, names)
        for entity in ("users", "posts"):
            await third.run("export", entity, "--output", f"{entity}.{ending}")

    for name in names:
        contents = {unpacked(folder.joinpath(name).read_bytes()) for folder in folders}
        assert len(contents) == 1
        assert len(contents.pop()) > 1000


def unpacked(content: bytes) -> bytes:
    """Return the content of a file, without the header of gzip, which has a time."""
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command is independent of it."""
    return sqlite_url


async def test_exports_lines_of_json(roster: Roster, server: Server) -> None:
    """All fields except the password hash; null differs from the empty string; times end in Z."""
    await fill(server.database)

    users = await roster.run("export", "users")
    posts = await roster.run("export", "posts")

    rows = [json.loads(line) for line in users.out.split("\n")[:-1]]
    assert users.err.startswith(f"{len(AWKWARD)} users, ")
    assert [row["full_name"] for row in rows] == AWKWARD
    assert rows[1] == {
        "id": 28,
        "email": "é1@example.org",
        "full_name": "",
        "is_active": False,
        "created_at": "2024-01-31T12:00:00.000001Z",
        "updated_at": "9999-12-31T23:59:59.999999Z",
        "version": 2,
    }
    assert [json.loads(line)["content"] for line in posts.out.split("\n")[:-1]] == CONTENTS
    assert json.loads(posts.out.splitlines()[0]) == {
        "id": 1,
        "title": '""',
        "content": "",
        "author_id": 7,
        "created_at": "0001-01-01T00:00:00.000000Z",
        "updated_at": "2024-01-31T12:00:00.000000Z",
        "version": 1,
    }


async def test_exports_csv_for_other_readers(roster: Roster, server: Server) -> None:
    """Null is an empty cell and the empty string is quoted, as in PostgreSQL's COPY."""
    await fill(server.database)

    done = await roster.run("export", "users", "--format", "csv")

    head, null, empty = done.out.splitlines()[:3]
    assert head == "id,email,full_name,is_active,created_at,updated_at,version"
    assert null.startswith("7,é0@example.org,,true,2024-01-31T12:00:00.000000Z,")
    assert empty.startswith('28,é1@example.org,"",false,2024-01-31T12:00:00.000001Z,')
    read = list(csv.DictReader(io.StringIO(done.out, newline="")))
    assert [row["full_name"] for row in read] == [name or "" for name in AWKWARD]


async def test_exports_rows_by_filter_and_id(roster: Roster, server: Server) -> None:
    """`--filter` and `--after-id` can be combined."""
    ids = await add_users(server.database, 9)
    filter_ = 'email != "user4@example.org"'

    done = await roster.run("export", "users", "--filter", filter_, "--after-id", str(ids[2]))

    assert [json.loads(line)["id"] for line in done.out.splitlines()] == [ids[3], *ids[5:]]


async def test_exports_no_rows(roster: Roster) -> None:
    """The file is complete: CSV has its header line."""
    done = await roster.run("export", "posts", "--output", "posts.csv")

    assert done.status == 0
    assert roster.read("posts.csv") == b"id,title,content,author_id,created_at,updated_at,version\n"
    assert [path.name for path in roster.folder.iterdir()] == ["posts.csv"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "posts.txt"], "the name of posts.txt does not imply a format; add --format"),
        (["--output", "nowhere/posts.csv"], "can't write nowhere/posts.csv: No such file or directory"),
        (["--output", "posts.csv", "--filter", "title"], "at character 6"),
        (["--output", "posts.csv", "--address", "127.0.0.1:1"], "no server answers at 127.0.0.1:1"),
    ],
)
async def test_reports_why_it_can_not_run(roster: Roster, arguments: list[str], expected: str) -> None:
    """The status is 2; the file of an earlier export is not changed."""
    (roster.folder / "posts.csv").write_text("earlier")

    done = await roster.run("export", "posts", *arguments)

    assert (done.status, done.out, roster.read("posts.csv")) == (2, "", b"earlier")
    assert expected in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert "--after-id" not in done.err


async def test_creates_no_file_without_pyarrow(roster: Roster) -> None:
    """The error says what to install."""
    (roster.folder / "pyarrow.py").write_text("raise ImportError")

    done = await run(
        *(ROSTER, "export", "posts", "--output", "posts.parquet"),
        folder=roster.folder,
        ROSTER_ADDRESS=roster.address,
        PYTHONPATH=str(roster.folder),
    )

    assert (done.status, "pip install pyarrow" in done.err) == (2, True)
    assert not list(roster.folder.glob("*.part"))


async def exporting(roster: Roster, server: Server) -> asyncio.subprocess.Process:
    """Start an export of 30 MiB that blocks on its reader."""
    authors = await add_users(server.database)
    await add_posts(server.database, authors * 30, content="x" * (1 << 20))
    process = await roster.start("export", "posts")
    assert process.stdout
    await process.stdout.read(1)
    return process


async def test_continues_after_a_restart_of_the_server(roster: Roster, server: Server) -> None:
    """Each row is exported once, in order."""
    process = await exporting(roster, server)
    await server.stop(grace=0)
    async with serve(server.settings.database_url, listen=server.address):
        done = await ended(process)

    assert done.status == 0
    assert "trying again in " in done.err
    titles = [json.loads(line)["title"] for line in f"{{{done.out}".splitlines()]
    assert titles == [f"Post {number}" for number in range(30)]


async def test_an_error_says_how_to_resume(roster: Roster, server: Server, tmp_path: Path) -> None:
    """It names the last row written. Here the server comes back with an empty database."""
    process = await exporting(roster, server)
    await server.stop(grace=0)
    async with serve(f"sqlite:///{tmp_path}/empty.db", listen=server.address):
        done = await ended(process)

    last_id = json.loads(f"{{{done.out}".splitlines()[-1])["id"]
    assert done.status == 2
    assert done.err.endswith(f"; resume with --after-id {last_id}\n")


async def test_ends_quietly_if_the_reader_closes_the_pipe(roster: Roster, server: Server) -> None:
    """As in `roster export posts | head -1`."""
    process = await exporting(roster, server)
    transport: Any = process
    transport._transport.get_pipe_transport(1).close()

    assert process.stderr
    assert await process.stderr.read() == b""
    assert await process.wait() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_reports_the_last_id(roster: Roster, server: Server, number: signal.Signals) -> None:
    """`--after-id` resumes from there. Here the server is away."""
    process = await exporting(roster, server)
    await server.stop(grace=0)
    assert process.stdout
    assert process.stderr
    rows = asyncio.create_task(process.stdout.read())
    while b"trying again" not in await process.stderr.readline():
        pass
    process.send_signal(number)
    err = (await process.stderr.read()).decode()

    last_id = json.loads((b"{" + await rows).splitlines()[-1])["id"]
    assert f"interrupted after id {last_id}: {last_id} posts, " in err
    assert await process.wait() == 128 + number
