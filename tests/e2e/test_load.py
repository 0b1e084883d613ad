"""`roster load` as its own process, against a real server."""

import asyncio
import gzip
import json
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from hashlib import sha256

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import text

from roster.client import channel
from roster.v1.bulk_pb2 import AbortBulkLoadRequest, BulkLoad, BulkOptions
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, GetUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.server import Server
from tests.support.command import Roster, ended, ndjson, run
from tests.support.rows import add_users
from tests.support.server import serve
from tests.support.users import list_users

# The rows are committed before the command receives the acks.
COMMITTED = "(250|500|750|1,000) rows committed, 0 failed"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command is independent of it."""
    return sqlite_url


async def test_loads_users_and_their_posts(roster: Roster, users: UserServiceAsyncStub) -> None:
    """The status is 0 if all rows are loaded; the summary counts them."""
    names = [{"email": f"{number}@example.org", "created_at": "2024-01-01", "foo": 1} for number in range(12)]
    posts = [{"title": "t", "author_email": f"{number}@example.org"} for number in range(12)]

    first = await roster.run("load", "users", roster.write("users.ndjson", *names), "--batch-rows", "5")
    second = await roster.run("load", "posts", roster.write("posts.ndjson", *posts))

    assert (first.status, second.status) == (0, 0)
    assert first.out.startswith("users.ndjson: 12 rows in ")
    assert first.out.endswith(": 12 created, 0 updated, 0 skipped, 0 failed\n")
    assert "ignored columns: created_at, foo\n" in first.err
    assert [user.email for user in (await users.ListUsers(ListUsersRequest())).users] == [
        f"{number}@example.org" for number in range(12)
    ]


async def test_rejects_can_be_fixed_and_loaded(roster: Roster, users: UserServiceAsyncStub) -> None:
    """The status is 1 if rows failed; one file has those the command or the server refused, in order."""
    name = roster.write(
        "users.ndjson", {"email": "a@example.org"}, {"email": 7}, {"email": "no address"}, "what?"
    )

    first = await roster.run("load", "users", name)
    rejects = roster.rejects("users.rejects.ndjson")
    fixed = roster.write("fixed.ndjson", *({**row, "email": f"{i}@x.org"} for i, row in enumerate(rejects)))
    second = await roster.run("load", "users", fixed)

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


async def test_loads_csv_from_standard_input(roster: Roster, users: UserServiceAsyncStub) -> None:
    """A dash is standard input; its format must be given."""
    rows = b"email,full_name,is_active\na@example.org,Ada,false\nb@example.org,,maybe\n"

    done = await roster.run("load", "users", "-", "--format", "csv", stdin=rows)

    assert done.status == 1
    assert done.out.startswith("stdin: 2 rows in ")
    assert (roster.folder / "stdin.rejects.csv").read_text() == (
        "_error,email,full_name,is_active\n"
        "line 3: INVALID_FIELD is_active: is_active must be true or false (yes/no and 1/0 work too),"
        "b@example.org,,maybe\n"
    )
    assert (await users.GetUser(GetUserRequest(email="a@example.org"))).full_name == "Ada"


async def test_on_conflict_update_writes_the_mask(roster: Roster, users: UserServiceAsyncStub) -> None:
    """Existing users get the columns of the mask."""
    name = roster.write("users.ndjson", {"email": "a@example.org", "full_name": "Ada", "is_active": False})
    await roster.run("load", "users", roster.write("first.ndjson", {"email": "a@example.org"}))

    done = await roster.run(
        "load", "users", name, "--on-conflict", "update", "--update-mask", "full_name", "--json"
    )

    user = await users.GetUser(GetUserRequest(email="a@example.org"))
    assert json.loads(done.out)["updated"] == 1
    assert (user.full_name, user.is_active) == ("Ada", True)


async def test_prints_the_summary_as_json(roster: Roster) -> None:
    """It has the counts, the reasons and the path of the rejects."""
    name = roster.write("users.ndjson", {"email": "a@example.org"}, {"email": "a@example.org"}, {})

    done = await roster.run("load", "users", name, "--json", "--rejects", "bad.ndjson", "--load-id", "staff")

    summary = json.loads(done.out)
    assert summary.pop("seconds") > 0
    assert summary == {
        "file": "users.ndjson",
        "load_id": "staff",
        "was_finished": False,
        "rows": 3,
        "created": 1,
        "updated": 0,
        "deleted": 0,
        "deleted_posts": 0,
        "skipped": 0,
        "failed": 2,
        "reasons": {"EMAIL_TAKEN email": 1, "INVALID_FIELD email": 1},
        "rejects": "bad.ndjson",
    }


async def test_validate_only_writes_nothing(roster: Roster, users: UserServiceAsyncStub) -> None:
    """The summary says so."""
    name = roster.write("users.ndjson", {"email": "a@example.org"}, {"email": "no address"})
    done = await roster.run("load", "users", name, "--validate-only")

    counts = "1 would be created, 0 updated, 0 skipped, 1 failed; nothing was written\n"
    assert done.out.partition("\n")[0].endswith(counts.rstrip())
    assert "roster loads show" not in done.out  # there is no load to show
    assert not (await users.ListUsers(ListUsersRequest())).users


@pytest.mark.parametrize("rows", [[{}, *["what?"] * 5], [{"email": "no address"}] * 5])
async def test_stops_if_too_many_rows_fail(roster: Roster, rows: list[object]) -> None:
    """Rows that can't be parsed count like those that the server refuses."""
    done = await roster.run("load", "users", roster.write("users.ndjson", *rows), "--max-failures", "4")

    assert (done.status, done.out) == (2, "")
    assert "rows failed" in done.err


REFUSED = {
    "unknown.csv": b"Mail\nada@example.org\n",
    "book.csv": b"PK\x03\x04sheet",
    "cut.csv.gz": gzip.compress(b"email\nada@example.org\n")[:-9],
}


@pytest.mark.parametrize("name", ["unknown.csv", "book.csv", "cut.csv.gz"])
async def test_a_refused_file_loads_nothing(roster: Roster, name: str) -> None:
    """The error ends with that, not with counts of rows."""
    (roster.folder / name).write_bytes(REFUSED[name])
    done = await roster.run("load", "users", name)

    assert (done.status, done.out) == (2, "")
    assert done.err.endswith("; nothing was loaded\n")
    assert "rows" not in done.err


@pytest.mark.parametrize("load_id", ["staff", "the staff of 2026", "o'neil; $(true)"])
async def test_failures_come_with_the_command_that_shows_them(roster: Roster, load_id: str) -> None:
    """A shell takes it as it is printed."""
    name = roster.write("users.ndjson", {"email": "no address"})
    done = await roster.run("load", "users", name, "--load-id", load_id)

    command = re.fullmatch(r"  `roster (.*)` lists the failures", done.out.splitlines()[-1])
    assert command
    shown = await roster.run(*shlex.split(command[1]))
    assert shown.status == 0
    assert re.search(f"^load_id +{re.escape(load_id)}$", shown.out, re.MULTILINE)
    assert "INVALID_FIELD email" in shown.out


async def test_a_load_without_failures_needs_no_command(roster: Roster) -> None:
    """Its summary is one line."""
    done = await roster.run("load", "users", roster.write("users.ndjson", {"email": "a@example.org"}))

    assert len(done.out.splitlines()) == 1


async def test_a_stopped_load_names_its_id(roster: Roster) -> None:
    """The derived one is known from nowhere else."""
    name = roster.write("users.ndjson", *[{"email": "no address"}] * 5)
    done = await roster.run("load", "users", name, "--max-failures", "1", "--batch-rows", "1")

    command = re.search(
        r"`roster (loads show users-create-[0-9a-f]{32})` describes the load$", done.err.strip()
    )
    assert command
    assert (await roster.run(*command[1].split())).status == 0


async def test_rows_of_an_earlier_load_are_explained(roster: Roster) -> None:
    """Someone fixes the file that they loaded, not the rejects."""
    hint = "--on-conflict skip"
    rows = [{"email": f"{number}@example.org"} for number in range(3)]
    await roster.run("load", "users", roster.write("users.ndjson", *rows, {"email": "no address"}))
    name = roster.write("users.ndjson", *rows, {"email": "fixed@example.org"})
    again = await roster.run("load", "users", name)
    skipped = await roster.run("load", "users", name, *hint.split())
    few = roster.write("few.ndjson", rows[0], {"email": "no address"}, {"email": "nobody"})

    assert f"  rows that are already in Roster: {hint} skips them" in again.out.splitlines()
    assert (skipped.status, "0 created, 0 updated, 4 skipped" in skipped.out) == (0, True)
    assert hint not in skipped.out
    assert hint not in (await roster.run("load", "users", few)).out


async def test_an_update_to_a_taken_email_is_not_a_second_load(roster: Roster, server: Server) -> None:
    """Skipping is for rows that exist; here they are meant to."""
    first, _ = await add_users(server.database, 2)
    name = roster.write("users.ndjson", {"id": first, "email": "user1@example.org"})
    done = await roster.run("load", "users", name, "--update", "--update-mask", "email")

    assert "EMAIL_TAKEN" in done.out
    assert "--on-conflict" not in done.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["users", "missing.ndjson"], "'missing.ndjson' does not exist"),
        (["users", "users.dat"], "add --format"),
        (
            ["users", "users.ndjson", "--on-conflict", "update"],
            "--on-conflict update requires --update-mask",
        ),
        (["users", "users.ndjson", "--update"], "--update requires --update-mask"),
        (["users", "users.ndjson", "--rejects", "./users.ndjson"], "is the file to load"),
        (["users", "users.ndjson", "--rejects", "nowhere/rejects"], "can't write to directory nowhere"),
        (["users", "users.ndjson", "--format", "csv"], "the file looks like JSON; add --format ndjson"),
        (["users", "users.ndjson", "--validate-only", "--caller", "jwt:ada"], "--caller resumes a load"),
        (["users", "-", "--caller", "jwt:ada"], "nothing was loaded: --caller needs --load-id"),
        (["users", "users.ndjson", "--address", "127.0.0.1:1"], "127.0.0.1:1; start one with `roster serve`"),
        (
            ["posts", "posts.ndjson", "--on-conflict", "skip"],
            "nothing was loaded: --on-conflict",
        ),
    ],
)
async def test_reports_why_it_can_not_run(roster: Roster, arguments: list[str], expected: str) -> None:
    """The status is 2; nothing is written, and no traceback is printed."""
    roster.write("users.ndjson", {"email": "a@example.org"})
    roster.write("users.dat")
    roster.write("posts.ndjson", {"title": "On engines", "author_email": "a@example.org"})

    done = await roster.run("load", *arguments, stdin=b"{}\n")

    assert (done.status, done.out) == (2, "")
    assert expected in " ".join(done.err.split())
    assert "Traceback" not in done.err


async def test_updates_by_id(roster: Roster, users: UserServiceAsyncStub, server: Server) -> None:
    """Rows have ids and optional versions; only the columns of the mask are written."""
    first, second = await add_users(server.database, 2)
    rows = f'id,version,full_name,email\n{first},1,Ada,x\n{second},7,Alan,y\n{second},,"",z\n'.encode()
    (roster.folder / "names.csv").write_bytes(rows)

    done = await roster.run("load", "users", "names.csv", "--update", "--update-mask", "full_name", "--json")

    names = [(user.full_name, user.version) for user in (await users.ListUsers(ListUsersRequest())).users]
    assert done.status == 1
    assert json.loads(done.out)["updated"] == 2
    assert json.loads(done.out)["reasons"] == {"VERSION_MISMATCH version": 1}
    assert names == [("Ada", 2), ("", 2)]


# Four of ten rows are valid; of the others a third can be parsed, and is refused by the server.
ROWS = [
    {"email": f"{number}@example.org"} if number % 10 < 4 else "what?" if number % 3 else {"email": "no"}
    for number in range(200)
]


@pytest.mark.parametrize("atomicity", ["row", "batch"])
async def test_the_same_command_resumes(roster: Roster, users: UserServiceAsyncStub, atomicity: str) -> None:
    """Nothing is lost or duplicated; summary and rejects are those of a load that was never stopped."""
    command = ["load", "users", roster.write("users.ndjson", *ROWS), "--batch-rows", "9", "--json"]
    command += ["--on-conflict", "skip", "--atomicity", atomicity]

    stopped = await roster.run(*command, "--max-failures", "60")
    resumed = await roster.run(*command)
    rejects = roster.read("users.rejects.ndjson")
    finished = await roster.run(*command)
    rejects_when_finished = roster.read("users.rejects.ndjson")
    at_once = await roster.run(*command, "--load-id", "another")

    summaries = [json.loads(done.out) for done in (resumed, finished, at_once)]
    counts = [(of["rows"], of["created"] + of["skipped"], of["failed"], of["reasons"]) for of in summaries]
    page = await users.ListUsers(ListUsersRequest(page_size=1000))
    assert (stopped.status, resumed.status, finished.status, at_once.status) == (2, 1, 1, 1)
    assert re.search(r"^resuming at row [1-9]", resumed.err, re.MULTILINE)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] == 200
    assert len(page.users) == summaries[0]["created"] == summaries[1]["created"]
    assert [of["was_finished"] for of in summaries] == [False, True, False]
    assert rejects == rejects_when_finished == roster.read("users.rejects.ndjson")
    assert len(rejects.splitlines()) == summaries[0]["failed"]


async def test_resumes_load_of_another_caller(roster: Roster, server: Server) -> None:
    """The file alone names the load; the command says whose it is, and has the failures of both runs."""
    command = ["load", "users", roster.write("users.ndjson", *ROWS), "--batch-rows", "9", "--json"]
    stopped = await roster.run(*command, "--max-failures", "60")
    async with server.database.begin() as session:
        await session.execute(text("UPDATE bulk_loads SET caller = 'jwt:ada'"))

    resumed = await roster.run(*command, "--caller", "jwt:ada")
    resumed_rejects = roster.read("users.rejects.ndjson")
    refused = await roster.run(*command, "--caller", "jwt:bob")
    begun = await roster.run(*command)

    assert (stopped.status, resumed.status, refused.status, begun.status) == (2, 1, 2, 1)
    assert re.search(r"^resuming the load of jwt:ada at row [1-9]", resumed.err, re.MULTILINE)
    assert "nothing was loaded: there is no such load" in " ".join(refused.err.split())
    assert [json.loads(done.out)[key] for done in (resumed, begun) for key in ("rows", "created")] == [
        200,
        80,
        200,
        0,
    ]
    assert len(resumed_rejects.splitlines()) == 120


async def test_reports_that_a_load_is_already_finished(roster: Roster) -> None:
    """It prints the same counts, and sends nothing."""
    name = roster.write("users.ndjson", {"email": "a@example.org"}, {"email": "b@example.org"})

    first = await roster.run("load", "users", name)
    second = await roster.run("load", "users", name)

    assert (first.status, second.status) == (0, 0)
    assert second.out.rpartition(")")[2] == first.out.rpartition(")")[2]
    assert second.out.startswith("users.ndjson: already finished, nothing was sent (use another --load-id ")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["a", "b", "c"], "the load is finished; use another --load-id for new rows"),
        (["a"], "the file has only 1 row, but the load already has 2"),
    ],
)
async def test_refuses_other_rows_for_a_load_id(roster: Roster, rows: list[str], expected: str) -> None:
    """A load ID can't be reused for another file by mistake."""
    files = [ndjson(*({"email": f"{name}@example.org"} for name in names)) for names in (["a", "b"], rows)]

    for rows_sent in files:
        done = await roster.run("load", "users", "-", "--load-id", "staff", stdin=rows_sent)

    assert done.status == 2
    assert expected in " ".join(done.err.split())
    assert "run the same command" not in done.err


async def feed(process: asyncio.subprocess.Process, first: int, last: int) -> None:
    """Write users to the standard input of a command."""
    assert process.stdin
    process.stdin.write(ndjson(*({"email": f"{number}@example.org"} for number in range(first, last))))
    await process.stdin.drain()


async def wait_for_rows(users: UserServiceAsyncStub, count: int, process: asyncio.subprocess.Process) -> None:
    """Wait until this many users are committed."""
    while len((await users.ListUsers(ListUsersRequest(page_size=1000))).users) < count:
        assert process.returncode is None


@pytest.fixture
async def waiting(roster: Roster, users: UserServiceAsyncStub) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command with 1,000 rows committed, waiting for its standard input."""
    process = await roster.start("load", "users", "-", "--batch-rows", "250")
    await feed(process, 0, 1000)
    await wait_for_rows(users, 1000, process)
    yield process
    assert process.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_reports_the_committed_rows(
    waiting: asyncio.subprocess.Process, number: signal.Signals
) -> None:
    """SIGINT and SIGTERM end a load at once, with the status that shells use."""
    waiting.send_signal(number)

    _, err = await waiting.communicate()

    assert waiting.returncode == 128 + number
    assert re.fullmatch(f"interrupted: {COMMITTED}\n", err.decode())


async def test_sigterm_ends_a_job_that_ignores_sigint() -> None:
    """Shells start background jobs of scripts like this."""
    code = (
        "import asyncio, signal\n"
        "from service.cli.terminal import exit_on_signal\n"
        "async def wait(): signal.raise_signal(signal.SIGTERM); await asyncio.Event().wait()\n"
        "with exit_on_signal(lambda: ': done'): asyncio.run(wait())\n"
    )

    job = await run("sh", "-c", f"trap '' INT; exec {sys.executable} -c {shlex.quote(code)}")

    assert (job.status, job.err) == (128 + signal.SIGTERM, "interrupted: done\n")


async def test_a_lost_server_reports_the_committed_rows(
    waiting: asyncio.subprocess.Process, server: Server
) -> None:
    """A load without an ID can't be resumed: the status is 2."""
    await server.stop(grace=0)

    _, err = await waiting.communicate()

    assert waiting.returncode == 2
    assert re.search(f"Error: stdin: the load stopped: .*; {COMMITTED}\n", err.decode())


async def test_continues_after_a_restart_of_the_server(
    roster: Roster, users: UserServiceAsyncStub, server: Server
) -> None:
    """The server stops with batches in flight; the command resumes on the next server by itself."""
    rows = [{"email": f"{number % 450}@example.org"} for number in range(500)]
    process = await roster.start("load", "users", roster.write("users.ndjson", *rows), "--batch-rows", "3")
    await wait_for_rows(users, 100, process)
    await server.stop(grace=0)
    async with serve(server.settings.database_url, listen=server.address):
        done = await ended(process)
        stored = await list_users(users)

    assert "trying again in " in done.err
    assert done.out.splitlines()[0].endswith("): 450 created, 0 updated, 0 skipped, 50 failed")
    assert len(stored) == 450
    assert [row["email"] for row in roster.rejects("users.rejects.ndjson")] == [
        f"{number}@example.org" for number in range(50)
    ]


async def test_a_second_loader_fences_the_first(roster: Roster, users: UserServiceAsyncStub) -> None:
    """The first does not reconnect, and nothing is duplicated."""
    command = ["load", "users", "-", "--load-id", "staff", "--batch-rows", "500"]
    first = await roster.start(*command)
    await feed(first, 0, 1000)
    await wait_for_rows(users, 1000, first)
    rows = ndjson(*({"email": f"{number}@example.org"} for number in range(1100)))

    second = await roster.run(*command, stdin=rows)
    await feed(first, 1000, 1100)
    fenced = await ended(first)

    assert (second.status, fenced.status) == (0, 2)
    assert "resuming at row 1,001\n" in second.err
    assert "a newer stream has opened this load" in fenced.err
    assert second.out.splitlines()[0].endswith("): 1,100 created, 0 updated, 0 skipped, 0 failed")


async def test_an_aborted_load_accepts_no_rows(roster: Roster, server: Server) -> None:
    """The error counts the committed rows, and asks for another load ID."""
    name = roster.write("users.ndjson", {"email": "a@example.org"}, *[{"email": "no"}] * 9)
    command = ["load", "users", name, "--load-id", "staff", "--batch-rows", "1", "--max-failures", "1"]
    await roster.run(*command)
    async with channel(server.address) as connection:
        loads = BulkServiceStub(connection)
        aborted = await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id="staff"))
    done = await roster.run(*command)

    assert aborted.state == BulkLoad.ABORTED
    assert done.status == 2
    message = "the load was aborted; use another --load-id; 1 row committed, "
    assert message in done.err
    assert aborted.failed == int(done.err.partition(message)[2].split()[0])


async def test_never_overwrites_edited_rejects(roster: Roster) -> None:
    """The next run writes another file and says so; the run after that replaces its own."""
    name = roster.write("users.csv", "email", "no one", "nobody")
    await roster.run("load", "users", name)
    rejects = roster.read("users.rejects.csv")
    edited = rejects.replace(b"no one", b"one@example.org")
    (roster.folder / "users.rejects.csv").write_bytes(edited)

    again = [await roster.run("load", "users", name) for _ in range(2)]

    assert [done.out.splitlines()[-2] for done in again] == [
        "  the failed rows are in users.rejects.2.csv; users.rejects.csv has other content and was kept"
    ] * 2
    assert (roster.read("users.rejects.csv"), roster.read("users.rejects.2.csv")) == (edited, rejects)
    assert sorted(path.name for path in roster.folder.iterdir()) == [
        "users.csv",
        "users.rejects.2.csv",
        "users.rejects.csv",
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], "the file is empty"), (["mail;full_name"], "it is email, add --columns email=mail")],
)
async def test_an_unreadable_file_opens_no_load(roster: Roster, rows: list[str], expected: str) -> None:
    """The header is checked first."""
    done = await roster.run("load", "users", roster.write("users.csv", *rows), "--load-id", "staff")

    assert done.status == 2
    assert expected in " ".join(done.err.split())
    assert (await roster.run("loads", "--json")).out == ""


async def test_reports_the_first_line_of_each_reason(roster: Roster) -> None:
    """The server counts rows that could not be parsed too: an offset is a position in the file."""
    done = await roster.run(
        "load",
        "users",
        roster.write("users.ndjson", "{what?", {"email": "no one"}, {"email": "ada@example.org"}),
    )
    loads = await roster.run("loads", "--json")

    lines = done.out.splitlines()
    assert lines[0].endswith("1 created, 0 updated, 0 skipped, 2 failed")
    assert lines[1].startswith("  1 x MALFORMED_MESSAGE, first at line 1: the line is not JSON")
    assert lines[2].startswith("  1 x INVALID_FIELD email, first at line 2: email must be")
    [load] = map(json.loads, loads.out.splitlines())
    assert (load["next_offset"], load["failed"]) == ("3", "2")


@pytest.mark.parametrize("is_finished", [True, False])
async def test_refuses_the_load_of_an_earlier_release(
    roster: Roster, users: UserServiceAsyncStub, is_finished: bool
) -> None:
    """Its offsets do not count rows that could not be parsed, so that rows would be loaded twice."""
    name = roster.write("users.csv", "email", "a@example.org", "b@example.org")
    content = sha256((roster.folder / name).read_bytes()).digest()
    options = BulkOptions(update_mask=FieldMask()).SerializeToString(deterministic=True)
    earlier = f"users-create-{sha256(b'/'.join((content, b'Csv', options))).hexdigest()[:32]}"
    call = users.BulkCreateUsers()
    await call.write(BulkCreateUsersRequest(options=BulkOptions(load_id=earlier)))
    await call.write(BulkCreateUsersRequest(users=[User(email="a@example.org")], finish=is_finished))
    await call.done_writing()
    assert [response async for response in call]

    done = await roster.run("load", "users", name)
    other = await roster.run("load", "users", name, "--load-id", "again", "--on-conflict", "skip")

    assert done.status == 2
    state = "FINISHED" if is_finished else "OPEN"
    assert f"began the load {earlier} of this file: {state}, 1 row." in " ".join(done.err.split())
    assert "1 created, 0 updated, 1 skipped" in other.out


async def test_resumes_by_position(roster: Roster, users: UserServiceAsyncStub, server: Server) -> None:
    """Rows before the offset are not parsed unless they failed; the rejects are complete again."""
    lines = [
        "email,full_name",
        "a@example.org,",
        "b@example.org",
        'c"@example.org,"C"x',
        *[f"{n}@example.org," for n in range(9)],
    ]
    name = roster.write("users.csv", *lines)
    await roster.run("load", "users", name, "--load-id", "staff")
    rejects = roster.read("users.rejects.csv")

    again = await roster.run("load", "users", name, "--load-id", "staff")
    longer = await roster.run("load", "users", roster.write("more.csv", *lines[:3]), "--load-id", "staff")

    assert "already finished" in again.out
    assert again.status == 1
    assert "10 created, 0 updated, 0 skipped, 2 failed" in again.out
    assert roster.read("users.rejects.csv") == rejects
    assert len(rejects.splitlines()) == 3
    assert "the file has only 2 rows, but the load already has 12" in longer.err
    assert len(await list_users(users)) == 10
