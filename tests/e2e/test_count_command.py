"""`roster count` as its own process."""

import json

import pytest

from service.server import Server
from tests.support.command import Roster
from tests.support.rows import add_posts, add_users


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command is independent of it."""
    return sqlite_url


async def test_prints_the_count(roster: Roster, server: Server) -> None:
    """For people, or as JSON; a count that is not exact says so."""
    first, second, *_ = await add_users(server.database, 1200)
    await add_posts(server.database, [first, second, first])
    outputs = {
        ("users",): "1,200\n",
        ("users", "--filter", f"id <= {second}"): "2\n",
        ("users", "--at-most", "1000"): "more than 1,000\n",
        ("posts", "--author-id", str(first)): "2\n",
    }
    for arguments, expected in outputs.items():
        done = await roster.run("count", *arguments)
        assert (done.status, done.out, done.err) == (0, expected, "")
    done = await roster.run("count", "posts", "--at-most", "1", "--json")
    assert json.loads(done.out) == {"count": 1, "is_exact": False}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["users", "--author-id", "1"], "--author-id is for posts"),
        (["users", "--at-most", "0"], "0 is not in the range 1<=x<=1000000"),
        (["users", "--filter", "id ="], "at character 5: expected a value"),
        (["users", "--address", "127.0.0.1:1"], "no server answers at 127.0.0.1:1"),
    ],
)
async def test_reports_errors(roster: Roster, arguments: list[str], expected: str) -> None:
    """The status is 2, and no traceback is printed."""
    done = await roster.run("count", *arguments)

    assert (done.status, done.out) == (2, "")
    assert expected in " ".join(done.err.split())
    assert "Traceback" not in done.err
