"""`roster load` as a person runs it: a process of its own against a real server."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator

import pytest

from roster.v1.bulk_pb2 import AbortBulkLoadRequest, BulkLoad
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.users_pb2 import GetUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.client import channel
from service.server import Server
from service.settings import Settings
from tests.rows import add_users
from tests.support.command import Roster, ended, ndjson

# The rows are in before the command learns it.
MOST_IN = "(250|500|750|1,000) rows are in and durable, 0 failed"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command does not know which it is."""
    return sqlite_url


async def test_loads_users_and_their_posts(roster: Roster, users: UserServiceStub) -> None:
    """All rows in is status 0; the sentence at the end counts them."""
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


async def test_rejects_can_be_mended_and_loaded(roster: Roster, users: UserServiceStub) -> None:
    """A load with failed rows is status 1; what failed, here and there, is in one file, in order."""
    name = roster.write(
        "users.ndjson", {"email": "a@example.org"}, {"email": 7}, {"email": "no address"}, "what?"
    )

    first = await roster.run("load", "users", name)
    rejects = roster.rejects("users.rejects.ndjson")
    mended = roster.write("mended.ndjson", *({**row, "email": f"{i}@x.org"} for i, row in enumerate(rejects)))
    second = await roster.run("load", "users", mended)

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


async def test_takes_csv_from_standard_input(roster: Roster, users: UserServiceStub) -> None:
    """The dash is standard input, whose format has to be said."""
    rows = b"email,full_name,is_active\na@example.org,Ada,false\nb@example.org,,maybe\n"

    done = await roster.run("load", "users", "-", "--format", "csv", stdin=rows)

    assert done.status == 1
    assert done.out.startswith("stdin: 2 rows in ")
    assert (roster.folder / "stdin.rejects.csv").read_text() == (
        "_error,email,full_name,is_active\n"
        "line 3: INVALID_FIELD is_active: is_active must be true or false,b@example.org,,maybe\n"
    )
    assert (await users.GetUser(GetUserRequest(email="a@example.org"))).full_name == "Ada"


async def test_on_conflict_update_writes_the_mask(roster: Roster, users: UserServiceStub) -> None:
    """Users who exist get the fields that are named."""
    name = roster.write("users.ndjson", {"email": "a@example.org", "full_name": "Ada", "is_active": False})
    await roster.run("load", "users", roster.write("first.ndjson", {"email": "a@example.org"}))

    done = await roster.run(
        "load", "users", name, "--on-conflict", "update", "--update-mask", "full_name", "--json"
    )

    user = await users.GetUser(GetUserRequest(email="a@example.org"))
    assert json.loads(done.out)["updated"] == 1
    assert (user.full_name, user.is_active) == ("Ada", True)


async def test_the_summary_for_programs_is_one_object(roster: Roster) -> None:
    """It has the counts, the reasons and where the rejects are."""
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
        "skipped": 0,
        "failed": 2,
        "reasons": {"EMAIL_TAKEN email": 1, "INVALID_FIELD email": 1},
        "rejects": "bad.ndjson",
    }


async def test_validate_only_writes_nothing(roster: Roster, users: UserServiceStub) -> None:
    """It says so, too."""
    done = await roster.run(
        "load", "users", roster.write("users.ndjson", {"email": "a@example.org"}), "--validate-only"
    )

    assert "nothing was written" in done.out
    assert not (await users.ListUsers(ListUsersRequest())).users


@pytest.mark.parametrize("rows", [["what?"] * 5, [{"email": "no address"}] * 5])
async def test_stops_where_too_many_rows_failed(roster: Roster, rows: list[object]) -> None:
    """Rows that can't be read count like those that the server refuses."""
    done = await roster.run("load", "users", roster.write("users.ndjson", *rows), "--max-failures", "4")

    assert (done.status, done.out) == (2, "")
    assert "rows failed" in done.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["users", "missing.ndjson"], "'missing.ndjson' does not exist"),
        (["users", "users.txt"], "add --format"),
        (
            ["users", "users.ndjson", "--on-conflict", "update"],
            "--on-conflict update needs --update-mask",
        ),
        (["users", "users.ndjson", "--update"], "--update needs --update-mask"),
        (["users", "users.ndjson", "--rejects", "./users.ndjson"], "is the file to load"),
        (["users", "users.ndjson", "--rejects", "nowhere/rejects"], "there is no folder nowhere"),
        (["users", "users.ndjson", "--format", "csv"], "the header line is no CSV"),
        (["users", "users.ndjson", "--address", "127.0.0.1:1"], "127.0.0.1:1; start one with `roster serve`"),
        (
            ["posts", "users.ndjson", "--on-conflict", "skip"],
            "nothing was loaded: --on-conflict",
        ),
    ],
)
async def test_says_why_it_can_not_run(roster: Roster, arguments: list[str], told: str) -> None:
    """Status 2 and one sentence; nothing is written, and no traceback is shown."""
    roster.write("users.ndjson", {"email": "a@example.org"})
    roster.write("users.txt")

    done = await roster.run("load", *arguments)

    assert (done.status, done.out) == (2, "")
    assert told in " ".join(done.err.split())
    assert "Traceback" not in done.err


async def test_updates_by_id(roster: Roster, users: UserServiceStub, server: Server) -> None:
    """Each row names its user, and the version where it minds; only what the mask names is written."""
    first, second = await add_users(server.database, 2)
    rows = f'id,version,full_name,email\n{first},1,Ada,x\n{second},7,Alan,y\n{second},,"",z\n'.encode()
    (roster.folder / "names.csv").write_bytes(rows)

    done = await roster.run("load", "users", "names.csv", "--update", "--update-mask", "full_name", "--json")

    names = [(user.full_name, user.version) for user in (await users.ListUsers(ListUsersRequest())).users]
    assert done.status == 1
    assert json.loads(done.out)["updated"] == 2
    assert json.loads(done.out)["reasons"] == {"VERSION_MISMATCH version": 1}
    assert names == [("Ada", 2), ("", 2)]


# Four good rows in ten; every third that is none can be read, and its batch goes to the server.
ROWS = [
    {"email": f"{number}@example.org"} if number % 10 < 4 else "what?" if number % 3 else {"email": "no"}
    for number in range(200)
]


@pytest.mark.parametrize("atomicity", ["row", "batch"])
async def test_the_same_command_goes_on(roster: Roster, users: UserServiceStub, atomicity: str) -> None:
    """Nothing is lost or doubled, and summary and rejects are those of a load that was never stopped."""
    command = ["load", "users", roster.write("users.ndjson", *ROWS), "--batch-rows", "9", "--json"]
    command += ["--on-conflict", "skip", "--atomicity", atomicity]

    stopped = await roster.run(*command, "--max-failures", "60")
    resumed = await roster.run(*command)
    rejects = roster.read("users.rejects.ndjson")
    finished = await roster.run(*command)
    rejects_when_finished = roster.read("users.rejects.ndjson")
    at_once = await roster.run(*command, "--load-id", "another")

    told = [json.loads(done.out) for done in (resumed, finished, at_once)]
    counts = [(of["rows"], of["created"] + of["skipped"], of["failed"], of["reasons"]) for of in told]
    page = await users.ListUsers(ListUsersRequest(page_size=1000))
    assert (stopped.status, resumed.status, finished.status, at_once.status) == (2, 1, 1, 1)
    assert re.search(r"^going on at row [1-9]", resumed.err, re.MULTILINE)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] == 200
    assert len(page.users) == told[0]["created"] == told[1]["created"]
    assert [of["was_finished"] for of in told] == [False, True, False]
    assert rejects == rejects_when_finished == roster.read("users.rejects.ndjson")
    assert len(rejects.splitlines()) == told[0]["failed"]


async def test_a_finished_load_says_so(roster: Roster) -> None:
    """The same summary comes again, and nothing is sent."""
    name = roster.write("users.ndjson", {"email": "a@example.org"}, {"email": "b@example.org"})

    first = await roster.run("load", "users", name)
    second = await roster.run("load", "users", name)

    assert (first.status, second.status) == (0, 0)
    assert second.out.rpartition(")")[2] == first.out.rpartition(")")[2]
    assert second.out.startswith("users.ndjson: finished before; nothing was sent (another --load-id ")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["a", "b", "c"], "the load is finished; begin another for new rows, with another --load-id"),
        (["a"], "the load has 2 rows already, and here are only 1"),
    ],
)
async def test_other_rows_are_no_part_of_a_load(roster: Roster, rows: list[str], told: str) -> None:
    """A name that was given to a load is not used for another file by mistake."""
    files = [ndjson(*({"email": f"{name}@example.org"} for name in names)) for names in (["a", "b"], rows)]

    for rows_sent in files:
        done = await roster.run("load", "users", "-", "--load-id", "staff", stdin=rows_sent)

    assert done.status == 2
    assert told in " ".join(done.err.split())
    assert "the same command" not in done.err


async def feed(process: asyncio.subprocess.Process, first: int, last: int) -> None:
    """Write users to the standard input of a command."""
    assert process.stdin
    process.stdin.write(ndjson(*({"email": f"{number}@example.org"} for number in range(first, last))))
    await process.stdin.drain()


async def are_in(users: UserServiceStub, count: int, process: asyncio.subprocess.Process) -> None:
    """Wait until so many users are there."""
    while len((await users.ListUsers(ListUsersRequest(page_size=1000))).users) < count:
        assert process.returncode is None


@pytest.fixture
async def waiting(roster: Roster, users: UserServiceStub) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command with 1,000 rows in, and a standard input that says no more."""
    process = await roster.start("load", "users", "-", "--batch-rows", "250")
    await feed(process, 0, 1000)
    await are_in(users, 1000, process)
    yield process
    assert process.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_says_what_is_in(
    waiting: asyncio.subprocess.Process, number: signal.Signals
) -> None:
    """Ctrl-C ends a load at once, and SIGTERM; with the status that a shell gives."""
    waiting.send_signal(number)

    _, err = await waiting.communicate()

    assert waiting.returncode == 128 + number
    assert re.fullmatch(f"interrupted: {MOST_IN}\n", err.decode())


async def test_a_server_that_goes_away_is_told_with_what_is_in(
    waiting: asyncio.subprocess.Process, server: Server
) -> None:
    """A load without a name can't go on: status 2, and no traceback."""
    await server.stop(grace=0)

    _, err = await waiting.communicate()

    assert waiting.returncode == 2
    assert re.search(f"Error: stdin: the load stopped: .*; {MOST_IN}\n", err.decode())


async def test_goes_on_through_a_restart_of_the_server(
    roster: Roster, users: UserServiceStub, server: Server
) -> None:
    """Batches are on their way when the server stops; the command comes back to the next one by itself."""
    rows = [{"email": f"{number % 450}@example.org"} for number in range(500)]
    process = await roster.start("load", "users", roster.write("users.ndjson", *rows), "--batch-rows", "3")
    await are_in(users, 100, process)
    await server.stop(grace=0)
    another = Server(Settings(database_url=server.settings.database_url, listen=server.address))
    await another.start()
    try:
        done = await ended(process)
        async with channel(another.address) as connection:
            page = await UserServiceStub(connection).ListUsers(ListUsersRequest(page_size=1000))
    finally:
        await another.stop(grace=0)

    assert "trying again in " in done.err
    assert done.out.splitlines()[0].endswith("): 450 created, 0 updated, 0 skipped, 50 failed")
    assert len(page.users) == 450
    assert [row["email"] for row in roster.rejects("users.rejects.ndjson")] == [
        f"{number}@example.org" for number in range(50)
    ]


async def test_a_second_loader_of_a_load_ends_the_first(roster: Roster, users: UserServiceStub) -> None:
    """The first does not come back, and nothing is doubled."""
    command = ["load", "users", "-", "--load-id", "staff", "--batch-rows", "500"]
    first = await roster.start(*command)
    await feed(first, 0, 1000)
    await are_in(users, 1000, first)
    rows = ndjson(*({"email": f"{number}@example.org"} for number in range(1100)))

    second = await roster.run(*command, stdin=rows)
    await feed(first, 1000, 1100)
    fenced = await ended(first)

    assert (second.status, fenced.status) == (0, 2)
    assert "going on at row 1,001\n" in second.err
    assert "a newer stream has opened this load" in fenced.err
    assert second.out.splitlines()[0].endswith("): 1,100 created, 0 updated, 0 skipped, 0 failed")


async def test_an_aborted_load_takes_no_more_rows(roster: Roster, server: Server) -> None:
    """The command says so, what is in, and that another name is needed."""
    name = roster.write("users.ndjson", {"email": "a@example.org"}, *[{"email": "no"}] * 9)
    command = ["load", "users", name, "--load-id", "staff", "--batch-rows", "1", "--max-failures", "1"]
    await roster.run(*command)
    async with channel(server.address) as connection:
        loads = BulkServiceStub(connection)
        aborted = await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id="staff"))
    done = await roster.run(*command)

    assert aborted.state == BulkLoad.ABORTED
    assert done.status == 2
    told = "the load was aborted; begin another, with another --load-id; 1 row is in and durable, "
    assert told in done.err
    assert aborted.failed == int(done.err.partition(told)[2].split()[0])


async def test_mended_rejects_are_not_overwritten(roster: Roster) -> None:
    """The same command again leaves them, and says where its own are; once more, and nothing is added."""
    name = roster.write("users.csv", "email", "no one", "nobody")
    await roster.run("load", "users", name)
    rejects = roster.read("users.rejects.csv")
    mended = rejects.replace(b"no one", b"one@example.org")
    (roster.folder / "users.rejects.csv").write_bytes(mended)

    again = [await roster.run("load", "users", name) for _ in range(2)]

    assert [done.out.splitlines()[-1] for done in again] == [
        "  the failed rows are in users.rejects.2.csv; users.rejects.csv is another's, or mended, and stays"
    ] * 2
    assert (roster.read("users.rejects.csv"), roster.read("users.rejects.2.csv")) == (mended, rejects)
    assert sorted(path.name for path in roster.folder.iterdir()) == [
        "users.csv",
        "users.rejects.2.csv",
        "users.rejects.csv",
    ]


@pytest.mark.parametrize(
    ("rows", "told"), [([], "the file is empty"), (["email;full_name"], "commas separate the columns")]
)
async def test_a_file_that_can_not_be_read_opens_no_load(roster: Roster, rows: list[str], told: str) -> None:
    """Its header is looked at before."""
    done = await roster.run("load", "users", roster.write("users.csv", *rows), "--load-id", "staff")

    assert done.status == 2
    assert told in " ".join(done.err.split())
    assert (await roster.run("loads", "--json")).out == ""


async def test_says_which_lines_failed_and_which_were_never_sent(roster: Roster) -> None:
    """The server counts the rows that it got."""
    done = await roster.run("load", "users", roster.write("users.ndjson", "what?", {"email": "no one"}))

    lines = done.out.splitlines()
    assert lines[1].startswith("  1 x MALFORMED_MESSAGE, first in line 1: the line is not JSON")
    assert lines[2].startswith("  1 x INVALID_FIELD email, first in line 2: email must be")
    assert lines[3] == "  1 row could not be read; `roster loads` does not count them"
