"""The example programs, against a real server."""

import asyncio
import os
import re
import sys
import time
from pathlib import Path

import pytest

from service.server import Server
from tests.e2e.clients import CHECKOUT
from tests.support.command import Ended, run, start
from tests.support.rows import add_users

CLIENT = CHECKOUT / "clients/python"
EXAMPLES = CLIENT / "examples"
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
    """A reader sees an example at a glance, and finds it in both indexes."""
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert f"[{path.name}](examples/{path.name})" in (CLIENT / "README.md").read_text()
    index = (CHECKOUT / "examples/README.md").read_text()
    assert f"[{path.name}](../clients/python/examples/{path.name})" in index


async def test_programs_of_the_readme(server: Server, tmp_path: Path) -> None:
    """Those that need no TLS; they name the default address."""
    programs = re.findall(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)
    runnable = [program for program in programs if "127.0.0.1:50051" in program]
    printed = []
    for program in runnable:
        (tmp_path / "program.py").write_text(program.replace("127.0.0.1:50051", server.address))
        ended = await run(sys.executable, tmp_path / "program.py")
        assert (ended.status, ended.err) == (0, "")
        printed.append(ended.out)

    assert printed == ["created user 1\n", "1 ada@example.org\n", "1000 created, []\n"]


async def test_blocking_calls(server: Server) -> None:
    """The second run finds the user that the first has created."""
    first, second = await example(server, "blocking_calls.py"), await example(server, "blocking_calls.py")

    assert (first.status, first.err) == (0, "")
    assert first.out == "grace@example.org is user 1\n1 grace@example.org\n"
    assert second.out == first.out


async def test_follow_changes(server: Server, tmp_path: Path) -> None:
    """A run that follows a stopped one prints what changed in between."""
    path = tmp_path / "token"
    first = await follow(server, path)
    began_at = await asyncio.to_thread(new_token, path, "")
    await add_users(server.database, 1, email="ada@example.org")
    lines = [await line(first)]
    await asyncio.to_thread(new_token, path, began_at)
    first.kill()
    await first.wait()
    await add_users(server.database, 1, email="bob@example.org")
    second = await follow(server, path)
    lines.append(await line(second))
    second.kill()
    await second.wait()

    assert lines == ["user 1: ada@example.org, version 1\n", "user 2: bob@example.org, version 1\n"]


async def follow(server: Server, path: Path) -> asyncio.subprocess.Process:
    """Start the example that stores its token in a file."""
    return await start(
        sys.executable, EXAMPLES / "follow_changes.py", str(path), ROSTER_ADDRESS=server.address
    )


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout
    return (await process.stdout.readline()).decode()


def new_token(path: Path, old: str) -> str:
    """Wait until a file has another token."""
    while not path.exists() or path.read_text() == old:
        time.sleep(0.01)
    return path.read_text()


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
