"""The commands in a real terminal, 80 and 50 columns wide."""

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.cli.environment import OTHER, setting_groups
from service.cli.table import fit
from service.server import Server
from service.settings import Settings
from tests.support.command import ROSTER, Roster
from tests.support.load_stream import LoadStream
from tests.support.terminal import Terminal, terminal

WIDTHS = pytest.mark.parametrize("columns", [80, 50])
LOAD_ID = "users-create-0123456789abcdef0123456789abcdef"  # as long as those of `roster load`


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the output is independent of it."""
    return sqlite_url


@pytest.fixture
async def rows(users: UserServiceAsyncStub) -> list[str]:
    """The e-mails of 1,500 stored users."""
    emails = [f"user{number}@example.org" for number in range(1500)]

    async def messages() -> Any:
        yield BulkCreateUsersRequest(users=[User(email=email) for email in emails])

    async for _ in users.BulkCreateUsers(messages()):
        pass
    return emails


def widest(shown: Terminal) -> int:
    """Return the length of the longest line."""
    return max(map(len, shown.lines))


async def test_export_shows_rows_and_nothing_in_them(roster: Roster, server: Server, rows: list[str]) -> None:
    """Each line is a row, up to the summary; no bar is drawn."""
    command = (ROSTER, "export", "users", "--address", server.address)
    async with terminal(*command, columns=80, folder=roster.folder) as shown:
        assert await shown.ended() == 0

    *exported, summary = shown.output.splitlines()
    assert [json.loads(row)["email"] for row in exported] == rows
    assert summary.startswith("1,500 users, ")


async def test_export_into_a_pipe_draws_no_bar(roster: Roster, server: Server, rows: list[str]) -> None:
    """The pipe may lead to the same terminal; `head` closes it early."""
    script = f"exec 3>&1; {ROSTER} export users --address {server.address} | head -n 2 >&3"
    async with terminal("bash", "-c", script, columns=80, folder=roster.folder) as shown:
        assert await shown.ended() == 0

    assert "\x1b" not in shown.output
    assert [json.loads(row)["email"] for row in shown.output.splitlines()] == rows[:2]


@WIDTHS
async def test_bar_is_one_line(roster: Roster, columns: int) -> None:
    """Its words are whole, and it is erased at the end."""
    name = roster.write("users.ndjson", *({"email": f"user{number}@example.org"} for number in range(900)))
    command = (ROSTER, "load", "users", name, "--address", roster.address)
    async with terminal(*command, columns=columns, folder=roster.folder) as shown:
        assert await shown.ended() == 0

    bars = [line for line in shown.lines if "rows/s, 0 failed" in line]
    assert bars
    assert max(map(len, bars)) <= columns
    *_, erased, _summary = re.split(r"(\x1b\[1A\x1b\[2K)", shown.output)
    assert erased


@WIDTHS
async def test_loads_are_a_table_with_whole_ids(
    roster: Roster, users: UserServiceAsyncStub, columns: int
) -> None:
    """A wide terminal shows every column, a narrow one fewer; an id is never cut, so that it can be used."""
    for load_id in (LOAD_ID, "nightly"):
        stream = await LoadStream.open(users, load_id)
        await stream.acknowledged("a", "no one", "b")
    command = (ROSTER, "loads", "--address", roster.address)
    async with terminal(*command, columns=columns, folder=roster.folder) as shown:
        assert await shown.ended() == 0
    async with terminal(*command, columns=140, folder=roster.folder) as wide:
        assert await wide.ended() == 0

    words = shown.output.split()
    assert widest(shown) <= columns
    assert len(shown.output.splitlines()) == (3 if columns == 80 else 6)
    assert [words[0], words[words.index("OPEN") - 1]] == ["state", "load"]
    assert [word for word in words if word in ("nightly", LOAD_ID)] == ["nightly", LOAD_ID]
    titles = ["state", "rows", "failed", "changed", "method", "caller", "load"]
    assert wide.output.splitlines()[0].split() == titles
    assert LOAD_ID in wide.output


@WIDTHS
async def test_details_and_failures_break_between_words(
    roster: Roster, users: UserServiceAsyncStub, columns: int
) -> None:
    """Joined again, the lines are those of a pipe."""
    stream = await LoadStream.open(users, on_conflict="SKIP")
    await stream.acknowledged("a", "no one", "a")
    command = ("loads", "show", "staff")
    async with terminal(
        ROSTER, *command, "--address", roster.address, columns=columns, folder=roster.folder
    ) as shown:
        assert await shown.ended() == 0
    piped = await roster.run(*command)

    assert widest(shown) <= columns
    assert shown.output.split() == piped.out.split()


@WIDTHS
async def test_errors_break_between_words(tmp_path: Path, columns: int) -> None:
    """The sentence is the same as in a log."""
    command = (ROSTER, "loads", "--address", "http://127.0.0.1:50051/")
    async with terminal(*command, columns=columns, folder=tmp_path) as shown:
        assert await shown.ended() == 2

    assert widest(shown) <= columns
    assert " ".join(shown.output.split()) == (
        "Error: --address http://127.0.0.1:50051/ has the scheme http, which gRPC does not use; write "
        "127.0.0.1:50051"
    )


@pytest.mark.parametrize("columns", [120, 80, 50])
@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "load",
        "loads",
        "users create",
        "posts list",
        "count",
        "export",
        "changes",
        "migrate",
        "doctor",
        "token issue",
    ],
)
async def test_help_fits_the_terminal(tmp_path: Path, command: str, columns: int) -> None:
    """Only a name that is longer than a line may exceed it; there is none."""
    async with terminal(ROSTER, *command.split(), "--help", columns=columns, folder=tmp_path) as shown:
        assert await shown.ended() == 0

    assert widest(shown) <= columns


async def test_help_of_serve_groups_all_settings(tmp_path: Path) -> None:
    """The essential ones come first; each is listed once, below the title of its group."""
    async with terminal(ROSTER, "serve", "--help", columns=80, folder=tmp_path) as shown:
        assert await shown.ended() == 0

    groups = dict(setting_groups())
    listed = [line.split()[0] for line in shown.lines if line.startswith("  ROSTER_")]
    titles = [line.removesuffix(":") for line in shown.lines if line.endswith(":") and line[0] != " "]
    assert listed == [f"ROSTER_{name.upper()}" for names in groups.values() for name in names]
    assert sorted(name for names in groups.values() for name in names) == sorted(Settings.model_fields)
    assert titles[1:] == [*groups]
    assert OTHER not in groups
    assert listed[:2] == ["ROSTER_DATABASE_URL", "ROSTER_LISTEN"]


@pytest.mark.parametrize("words", [["load", "users", "pipe", "--format", "csv"], ["loads"], ["serve"]])
async def test_ctrl_c_is_status_130_whenever_it_comes(tmp_path: Path, words: list[str]) -> None:
    """Before a command handles signals, Click would exit with 1, which means that rows failed."""
    os.mkfifo(tmp_path / "pipe")
    script = "import signal, sys, service.cli as cli\n"
    script += "cli.import_module = lambda name: signal.raise_signal(signal.SIGINT)\ncli.main()"
    python = Path(ROSTER).with_name("python")
    async with terminal(python, "-c", script, *words, columns=80, folder=tmp_path) as shown:
        assert await shown.ended() == 128 + signal.SIGINT

    assert shown.output.splitlines() == ["interrupted"]


async def test_ctrl_c_ends_a_load_with_status_130(roster: Roster) -> None:
    """As the help says. The server accepts connections and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        name = roster.write("users.ndjson", {"email": "ada@example.org"})
        command = (ROSTER, "load", "users", name, "--address", address)
        async with terminal(*command, columns=80, folder=roster.folder) as shown:
            await shown.shows("0 rows, 0 rows/s")
            shown.type("\x03")
            assert await shown.ended() == 130

    assert shown.plain.endswith("interrupted: nothing was loaded\r\n")


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (30, ["  a  b       c-id", "100  longer  x"]),
        (17, ["  a  b       c-id", "100  longer  x"]),
        (16, ["  a  c-id", "100  x"]),
        (13, ["  a  c-id", "100  x"]),
        (8, ["  a", "  c-id", "100", "  x"]),
        (3, ["  a", "  c-id", "100", "  x"]),
    ],
)
def test_table_drops_columns_until_it_fits(width: int, expected: list[str]) -> None:
    """The widest layout that fits is used; if there is none, the last column is on its own line."""
    layouts = [("a", "b", "c-id"), ("a", "c-id")]
    lines = fit([{"a": "100", "b": "longer", "c-id": "x"}], layouts, width, frozenset({"a"}))

    assert lines == expected


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (30, ["id  name                   age", " 7  a long name, in prose  3d"]),
        (29, ["id  name                  age", " 7  a long name, in pro…  3d"]),
        (25, ["id  name              age", " 7  a long name, in…  3d"]),
        (24, ["id  name", " 7  a long name, in pro…"]),
        (19, ["id", "  name", " 7", "  a long name, in prose"]),
    ],
)
def test_table_cuts_prose_before_it_drops_columns(width: int, expected: list[str]) -> None:
    """Down to 16 characters."""
    layouts = [("id", "name", "age"), ("id", "name")]
    rows = [{"id": "7", "name": "a long name, in prose", "age": "3d"}]

    assert fit(rows, layouts, width, frozenset({"id"}), "name") == expected
