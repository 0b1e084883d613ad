"""`roster changes`, `roster changes reset` and `roster export --watch-token-file` as their own processes."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from roster.client import channel, watch_changes
from service.server import Server
from service.users.model import User
from tests.support.command import ROSTER, Roster, ended, run
from tests.support.rows import add_posts, add_users

TOKEN = ("--watch-token-file", "token")


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """One database is enough for most tests: the command is independent of it."""
    return str(request.getfixturevalue(f"{getattr(request, 'param', 'sqlite')}_url"))


@asynccontextmanager
async def changes(roster: Roster, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `roster changes`, and kill it at the end of the block."""
    process = await roster.start("changes", *arguments)
    try:
        async with asyncio.timeout(20):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await ended(process)


async def printed(process: asyncio.subprocess.Process, count: int) -> list[dict[str, Any]]:
    """Return the next changes that it prints."""
    assert process.stdout
    return [json.loads(await process.stdout.readline()) for _ in range(count)]


async def stored_token(roster: Roster, *, after: str = "") -> str:
    """Return the token in the file, once there is another one than before."""
    path = roster.folder / "token"
    while not path.exists() or path.read_text() == after:  # noqa: ASYNC110  (another process writes it)
        await asyncio.sleep(0.01)
    return path.read_text()


async def test_continues_after_an_export_and_after_a_kill(roster: Roster, server: Server) -> None:
    """Nothing that has changed since the export began is missing."""
    ids = await add_users(server.database, 3)
    assert (await roster.run("export", "users", *TOKEN, "--output", "users.ndjson")).status == 0
    token = await stored_token(roster)
    async with server.database.begin() as session:
        await session.execute(update(User).where(User.id == ids[1]).values(full_name="Ada"))
    posts = await add_posts(server.database, ids[:1])

    # An export that is resumed keeps the token, since that of its first message is too new.
    resumed = await roster.run("export", "users", *TOKEN, "--after-id", str(ids[0]))
    assert len(resumed.out.splitlines()) == 2
    async with changes(roster, "--token-file", "token") as process:
        user, post = await printed(process, 2)
        await stored_token(roster, after=token)
    async with server.database.begin() as session:
        await session.execute(delete(User).where(User.id == ids[0]))
    async with changes(roster, *TOKEN, "--entity", "users") as process:
        [deleted] = await printed(process, 1)

    assert user["user"] == json.loads(resumed.out.splitlines()[0])
    assert post["post"]["id"] == posts[0]
    assert deleted["deleted_user_id"] == ids[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it(roster: Roster, server: Server, number: signal.Signals) -> None:
    """Also while it waits for its reader; it stores no token for changes that were not written."""
    async with changes(roster, *TOKEN) as process:
        token = await stored_token(roster)
        [author] = await add_users(server.database)
        await printed(process, 1)
        token = await stored_token(roster, after=token)
        await add_posts(server.database, [author], content="x" * (1 << 20))
        assert process.stdout
        assert process.stderr
        await process.stdout.read(1)
        process.send_signal(number)
        assert (await process.stderr.read()).endswith(b"\ninterrupted after 1 change\n")
        await process.stdout.read()  # asyncio waits for the end of the output too
        assert await process.wait() == 128 + number
        assert (roster.folder / "token").read_text() == token


async def test_ends_quietly_if_its_reader_is_gone(roster: Roster, server: Server) -> None:
    """As in `roster changes | head -1`: it does not wait for the next change."""
    async with changes(roster, *TOKEN) as process:
        await stored_token(roster)
        transport: Any = process
        transport._transport.get_pipe_transport(1).close()
        assert process.stderr
        said = (await process.stderr.read()).decode()
        # A misspelt name of the file would lose changes.
        assert said == f"{roster.folder}/token does not exist: beginning now\n"
        assert await process.wait() == 1


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_reset_begins_another_feed(roster: Roster, server: Server, tmp_path: Path) -> None:
    """A watch ends and says what to do. An export, here of nothing, has a token of the new feed."""
    async with changes(roster, *TOKEN) as process:
        await stored_token(roster)
        url = server.settings.database_url
        reset = await run(
            *(ROSTER, "changes", "reset"), folder=tmp_path, ROSTER_DATABASE_URL=url, ROSTER_TOKEN="unused"
        )
        done = await ended(process)
    assert (await roster.run("export", "users", *TOKEN)).status == 0
    ids = await add_users(server.database)
    async with (
        channel(server.address) as connection,
        aclosing(watch_changes(connection, (await stored_token(roster)).strip())) as responses,
    ):
        [change] = (await anext(responses)).changes

    assert (reset.status, reset.err) == (0, "")
    assert "a new feed has begun" in reset.out
    assert done.status == 2
    assert "`roster export users --watch-token-file token --output users.ndjson`" in done.err
    assert change.user.id == ids[0]


async def test_reset_creates_no_database(tmp_path: Path) -> None:
    """The folder of the command has no roster.db, and no URL is set."""
    done = await run(ROSTER, "changes", "reset", folder=tmp_path)

    assert done.status == 2
    assert f"{tmp_path}/roster.db does not exist" in " ".join(done.err.split())
    assert (await run("ls", folder=tmp_path)).out == ""


async def test_bearer_token_is_no_position(roster: Roster, server: Server) -> None:
    """Other commands call that file --token-file, which is another name of --watch-token-file here."""
    (roster.folder / "token").write_text("eyJhbGciOiJub25lIn0.e30.\n")
    done = await roster.run("changes", "--token-file", "token")
    assert done.status == 2
    assert done.err.endswith(
        "--watch-token-file is for the token of the feed; --bearer-token-file is for a bearer token\n"
    )
    assert (roster.folder / "token").read_text() == "eyJhbGciOiJub25lIn0.e30.\n"
