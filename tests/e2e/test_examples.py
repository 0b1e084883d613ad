"""The programs in `examples/`, against a real server."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from service.server import Server
from tests.e2e.clients import CHECKOUT
from tests.support.command import Ended, run, start
from tests.support.rows import add_users

EXAMPLES = CHECKOUT / "examples"
MAX_LINES = 80


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the examples are independent of it."""
    return sqlite_url


async def example(server: Server, name: str, *arguments: str) -> Ended:
    """Run an example to its end."""
    return await run(sys.executable, EXAMPLES / name, *arguments, ROSTER_ADDRESS=server.address)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_listed(path: Path) -> None:
    """A reader sees an example at a glance, and finds it in the index."""
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text()


async def test_calls(server: Server) -> None:
    """A repeated request gets the first response; errors differ by class."""
    ended = await example(server, "calls.py")

    assert (ended.status, ended.err) == (0, "")
    *lines, last = ended.out.splitlines()
    assert lines == [
        "created user 1, version 1",
        "created user 1, version 1",
        "user 1 already has this e-mail",
        "Ada King, version 2",
    ]
    assert last.startswith("nobody has the e-mail nobody-ada-")


async def test_calls_can_run_again(server: Server) -> None:
    """Each run uses another e-mail."""
    first, second = await example(server, "calls.py"), await example(server, "calls.py")

    assert first.out.startswith("created user 1, version 1\n")
    assert second.out.startswith("created user 2, version 1\n")


@pytest.mark.parametrize("name", ["list_users.py", "export_users.py"])
async def test_output_can_be_cut_off(name: str, server: Server) -> None:
    """As `head` does: it closes the pipe."""
    await add_users(server.database, 3)
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        EXAMPLES / name,
        env={**os.environ, "ROSTER_ADDRESS": server.address},
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writing)
    _, printed = await process.communicate()

    assert (process.returncode, printed) == (0, b"")


async def test_list_users(server: Server) -> None:
    """All pages are listed; an invalid filter is reported."""
    ids = await add_users(server.database, 101)

    listed = await example(server, "list_users.py")
    invalid = await example(server, "list_users.py", "(")

    assert len(listed.out.splitlines()) == len(ids)
    assert (invalid.status, invalid.out) == (1, "")
    assert invalid.err.startswith("invalid filter: ")


async def test_bulk_load_resumes_after_a_kill(server: Server) -> None:
    """The second run starts where the server is, and each row is written once."""
    script = EXAMPLES / "bulk_load.py"
    killed = await start(sys.executable, script, "20000", ROSTER_ADDRESS=server.address)
    assert killed.stdout
    async for line in killed.stdout:
        if line.endswith(b"rows committed\n"):
            killed.kill()
            break
    await killed.wait()

    resumed = await example(server, "bulk_load.py", "20000")

    first, *_, last = resumed.out.splitlines()
    assert (resumed.status, last) == (0, "finished: 19999 created, 1 failed")
    assert first != "starting at row 0"


async def test_export_users(server: Server) -> None:
    """The export has a header and the active users."""
    ids = await add_users(server.database, 3)

    ended = await example(server, "export_users.py")

    assert (ended.status, ended.err) == (0, "")
    header, *rows = ended.out.splitlines()
    assert header == "id,email,full_name"
    assert [int(row.split(",")[0]) for row in rows] == ids
