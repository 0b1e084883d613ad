"""`roster loads` as its own process."""

import json
import re

import grpc
import pytest

from roster.v1.bulk_pb2 import BulkLoad, GetBulkLoadRequest
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.loads.repository import LoadRepository
from service.server import Server
from tests.support.command import Roster
from tests.support.load_stream import LoadStream


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command is independent of it."""
    return sqlite_url


async def state(channel: grpc.aio.Channel, load_id: str) -> str:
    """Return the state of a load."""
    load = await BulkServiceStub(channel).GetBulkLoad(GetBulkLoadRequest(load_id=load_id))
    return BulkLoad.State.Name(load.state)


async def test_lists_loads_newest_first(roster: Roster, users: UserServiceAsyncStub) -> None:
    """One line for each load, or one JSON object."""
    for load_id in ("first", "second"):
        stream = await LoadStream.open(users, load_id)
        await stream.acknowledged("a", "no one", "b")
    await stream.finished()

    table = await roster.run("loads")
    objects = await roster.run("loads", "--json")

    head, second, first = table.out.splitlines()
    assert (table.status, table.err) == (0, "")
    assert head.split() == ["state", "rows", "failed", "changed", "method", "caller", "load"]
    assert [line.split()[:3] for line in (second, first)] == [["FINISHED", "3", "3"], ["OPEN", "3", "1"]]
    assert second.split()[5:] == ["BulkCreateUsers", "anonymous", "second"]
    assert [json.loads(line)["load_id"] for line in objects.out.splitlines()] == ["second", "first"]


async def test_shows_and_aborts_loads_of_other_callers(
    server: Server, roster: Roster, users: UserServiceAsyncStub
) -> None:
    """`--caller` says whose load is meant; without it, the loads of all callers are listed."""
    await LoadStream.open(users, "other")
    async with server.database.begin() as session:
        for caller in ("jwt:ada", "jwt:bob"):
            await LoadRepository(session, caller).open("staff", "roster.v1.UserService.BulkCreateUsers", b"")

    every = await roster.run("loads")
    of_ada = await roster.run("loads", "list", "--caller", "jwt:ada")
    unclear = await roster.run("loads", "show", "staff")
    shown = await roster.run("loads", "show", "staff", "--caller", "jwt:bob")
    aborted = await roster.run("loads", "abort", "staff", "--caller", "jwt:ada", stdin=b"y\n")
    after = await roster.run("loads", "show", "staff", "--caller", "jwt:bob", "--json")

    owned = [line.split()[6:] for line in every.out.splitlines()[1:]]
    assert owned == [["jwt:bob", "staff"], ["jwt:ada", "staff"], ["anonymous", "other"]]
    assert [line.split()[6:] for line in of_ada.out.splitlines()[1:]] == [["jwt:ada", "staff"]]
    assert (unclear.status, unclear.out) == (2, "")
    assert "several callers have a load of this name: jwt:ada, jwt:bob" in " ".join(unclear.err.split())
    assert re.search("^caller +jwt:bob$", shown.out, re.MULTILINE)
    assert "Abort load staff of jwt:ada?" in aborted.err
    assert re.search("^state +ABORTED$", aborted.out, re.MULTILINE)
    assert json.loads(after.out)["state"] == "OPEN"


async def test_shows_a_load_with_its_failures(roster: Roster, users: UserServiceAsyncStub) -> None:
    """It prints the counts, the options, and the failures of rows."""
    stream = await LoadStream.open(users, on_conflict="SKIP")
    await stream.acknowledged("a", "no one", "a")

    details = await roster.run("loads", "show", "staff")
    load, failure = (await roster.run("loads", "show", "staff", "--json")).out.splitlines()

    lines = dict(line.split(maxsplit=1) for line in details.out.splitlines())
    assert (lines["state"], lines["next_offset"], lines["created"], lines["failed"]) == (
        "OPEN",
        "3",
        "1",
        "1",
    )
    assert '"on_conflict": "SKIP"' in lines["options"]
    assert lines["offset"].startswith("1: INVALID_FIELD email: email must be")
    assert json.loads(load)["options"]["on_conflict"] == "SKIP"
    assert (json.loads(failure)["offset"], json.loads(failure)["reason"]) == ("1", "INVALID_FIELD")


@pytest.mark.parametrize(("answer", "status", "then"), [("y", 0, "ABORTED"), ("n", 1, "OPEN")])
async def test_asks_before_it_aborts(
    roster: Roster,
    users: UserServiceAsyncStub,
    channel: grpc.aio.Channel,
    answer: str,
    status: int,
    then: str,
) -> None:
    """Only `y` aborts."""
    await LoadStream.open(users)

    done = await roster.run("loads", "abort", "staff", stdin=f"{answer}\n".encode())

    assert "Abort load staff?" in done.err
    assert (done.status, await state(channel, "staff")) == (status, then)


async def test_aborts_without_asking(
    roster: Roster, users: UserServiceAsyncStub, channel: grpc.aio.Channel
) -> None:
    """`--yes` is for scripts; the load is printed after the abort."""
    await LoadStream.open(users)

    done = await roster.run("loads", "abort", "staff", "--yes", "--json")

    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out)["state"] == await state(channel, "staff") == "ABORTED"


async def test_can_not_abort_a_finished_load(roster: Roster, users: UserServiceAsyncStub) -> None:
    """The status is 1, and standard output is empty."""
    stream = await LoadStream.open(users)
    await stream.finished()

    done = await roster.run("loads", "abort", "staff", "--yes")

    assert (done.status, done.out) == (1, "")
    assert "the load is already finished" in done.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show"], "run `roster loads`, or `roster loads show LOAD_ID`"),
        (["list", "staff"], "run `roster loads`, or `roster loads show LOAD_ID`"),
        (["undo", "staff", "--yes"], "there is no such load; nothing was deleted"),
        (["abort", "staff", "--force"], "--dry-run and --force are for `roster loads undo`"),
        (["show", "staff"], "there is no such load"),
        (["abort", "staff", "--yes"], "there is no such load"),
        (["--address", "127.0.0.1:1"], "no server answers at 127.0.0.1:1"),
    ],
)
async def test_reports_errors(roster: Roster, arguments: list[str], expected: str) -> None:
    """The status is 2, and no traceback is printed."""
    done = await roster.run("loads", *arguments)

    assert (done.status, done.out) == (2, "")
    assert expected in " ".join(done.err.split())
    assert "Traceback" not in done.err
