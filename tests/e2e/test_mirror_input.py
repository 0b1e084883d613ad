"""Files and options of `roster load --mirror` and `--delete` that are refused, and how they end."""

import re
from pathlib import Path

import pytest

from roster.v1.posts_pb2 import ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.cli.mirror.mirror import PlanRefused
from service.server import Server
from tests.e2e.secured import secured
from tests.support.command import ROSTER, Roster, ended, start
from tests.support.mirror import MirrorRun
from tests.support.rows import add_posts, add_users, read_emails
from tests.support.users import list_names, list_users


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command is independent of it."""
    return sqlite_url


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("full_name\nAda\n", {}, "no column email"),
        ("email\n", {}, r"the file has no rows: 2 of the 2 users \(there is no --filter\) would be deleted"),
        ("email\nuser0@example.org\n", {}, r"1 row: 1 of the 2 users .* \(50\.0%\), more than"),
        ("email\nuser0@example.org\nUser0@Example.org.\n", {}, "line 2 and line 3"),
        ("email\nuser0@example.org\nno address\n,\n", {}, "line 3: email must be one name.*"),
        ("email,is_active\nuser0@example.org,maybe\n", {}, "line 2: is_active must be"),
        ("email\na@bücher.example\na@xn--bcher-kva.example\n", {}, "line 2 and line 3"),
        ("id,email\n1,a@example.org\n1,b@example.org\n", {"key": "id"}, "the same id; .*line 2 and line 3"),
        (
            "id,email\n1,a@example.org\n2,A@example.org\n",
            {"key": "id"},
            "the same email; .*line 2 and line 3",
        ),
        ("email\nuser0@example.org\n", {"key": "id"}, "no column id"),
        ("id\n1\n7\n", {"key": "id"}, "line 3: email is required for a new user"),
        ('email\n"a,b@example.org"\n', {}, "line 2: email must be one address alone"),
        ("email\nb@example.com\n", {"filter": 'email = "*@example.org"'}, "do not match the filter; line 2"),
        (
            "email,full_name\nuser0@example.org,Ada\n",
            {"filter": 'full_name = "Ada"'},
            "users who do not match the filter; line 2",
        ),
        (
            "id,email\n1,user1@example.org\n",
            {"key": "id", "filter": "id = 1"},
            "users who do not match the filter; line 2",
        ),
        (
            "id,email\n1,user1@example.org\n",
            {"key": "id", "deactivates": "yes", "limit": "100%"},
            "keeps it with --deactivate; line 2",
        ),
    ],
)
async def test_file_that_may_be_wrong_changes_nothing(
    server: Server,
    mirror: MirrorRun,
    users: UserServiceAsyncStub,
    text: str,
    options: dict[str, str],
    problem: str,
) -> None:
    """The error names the lines, or the numbers."""
    await add_users(server.database, 2)
    before = await list_users(users)

    with pytest.raises(PlanRefused) as refused:
        await mirror.run(text, **{"limit": "10%", **options})

    assert re.search(problem, "; ".join([str(refused.value), *refused.value.problems]))
    assert await list_users(users) == before


async def test_share_to_deactivate_is_of_active_users(mirror: MirrorRun, users: UserServiceAsyncStub) -> None:
    """Inactive users add up over the years: a share of all would soon allow to deactivate everybody."""
    for number in range(20):
        user = User(email=f"{number}@example.org", is_active=number < 2)
        await users.CreateUser(CreateUserRequest(user=user))

    with pytest.raises(PlanRefused, match=r"no rows: 2 of the 2 active users .* deactivated \(100\.0%\)"):
        await mirror.run("email\n", deactivates=True, limit="10%")


async def test_rights_are_checked_before_anything_is_written(sqlite_url: str, tmp_path: Path) -> None:
    """A caller who may delete, but not create, deletes nothing."""
    async with secured(sqlite_url, tmp_path, tokens=True) as served:
        await add_users(served.server.database)
        (tmp_path / "users.csv").write_text("email\nnew@example.org\n")
        command = ("load", "users", "users.csv", "--mirror", "--max-deletes", "1", "--tls-ca", "ca.pem")
        process = await start(
            ROSTER,
            *command,
            folder=tmp_path,
            ROSTER_ADDRESS=served.address,
            ROSTER_TOKEN=served.issuer.token("cleaner"),
        )
        refused = await ended(process)

        assert refused.status == 2
        assert "some users are to be created, for which the caller needs the role loader" in refused.err
        assert refused.err.endswith("; nothing was written\n")
        assert await read_emails(served.server.database) == ["user0@example.org"]


async def test_deletes_users_by_email(server: Server, roster: Roster, users: UserServiceAsyncStub) -> None:
    """Any spelling is found. Rows that fail or have posts with --restrict are reported."""
    first, *_ = await add_users(server.database, 4)
    await add_posts(server.database, [first, first])
    text = "Email,room\nUSER0@example.org,\nuser1@example.org,\nnobody@example.org,\n"
    (roster.folder / "gone.csv").write_text(text)

    tried = await roster.run("load", "users", "gone.csv", "--delete", "--validate-only")
    kept = await roster.run("load", "users", "gone.csv", "--delete", "--restrict", "--on-missing", "skip")
    names = await list_names(users)
    done = await roster.run("load", "users", "gone.csv", "--delete")

    assert (tried.status, kept.status, done.status) == (1, 1, 1)
    assert "2 would be deleted with 2 posts, 0 skipped, 1 failed; nothing was written\n" in tried.out
    assert "1 deleted, 1 skipped, 1 failed\n" in kept.out
    assert "USER_HAS_POSTS" in kept.out
    assert names == ["user0", "user2", "user3"]
    assert "1 deleted with 2 posts, 0 skipped, 2 failed\n" in done.out
    assert await list_names(users) == ["user2", "user3"]


async def test_deletes_posts_of_an_export(
    server: Server, roster: Roster, posts: PostServiceAsyncStub
) -> None:
    """Their versions are checked; the same command again finds the load finished."""
    first, second = await add_posts(server.database, 2 * await add_users(server.database))
    name = roster.write(
        "posts.ndjson", {"id": first, "version": 1, "title": "t"}, {"id": second, "version": 2}
    )

    done = await roster.run("load", "posts", name, "--delete")
    again = await roster.run("load", "posts", name, "--delete")

    assert "1 deleted, 0 skipped, 1 failed\n" in done.out
    assert "VERSION_MISMATCH" in done.out
    assert "already finished" in again.out
    assert [post.id for post in (await posts.ListPosts(ListPostsRequest())).posts] == [second]


async def test_two_keys_to_delete_by_are_refused(
    server: Server, roster: Roster, users: UserServiceAsyncStub
) -> None:
    """The id may be that of another system: nothing is guessed."""
    await add_users(server.database)
    name = roster.write("gone.ndjson", {"id": 1, "email": "user0@example.org"})

    refused = await roster.run("load", "users", name, "--delete")
    done = await roster.run("load", "users", name, "--delete", "--ignore", "id")

    assert (refused.status, done.status) == (2, 0)
    assert "there are columns for id and email" in refused.err
    assert "add --ignore id or --ignore email; nothing was loaded" in refused.err
    assert not await list_users(users)
