"""`roster load users FILE --mirror`: the users that match a filter become equal to a file."""

import json
import random
from collections.abc import Awaitable, Callable

import pytest

from roster.errors import TooLarge
from roster.v1.posts_pb2 import CreatePostRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    CreateUserRequest,
    DeleteUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.cli.mirror.report import MirrorReport
from service.server import Server
from tests.support.command import Roster, ended
from tests.support.mirror import MirrorRun
from tests.support.rival import until
from tests.support.rows import add_posts, add_users
from tests.support.users import list_users

HASH = "$2b$04$abcdefghijklmnopqrstuuIqkgDpSYLn8pWMEhVTSv5ZvHYRzS1Wy"


async def shown(users: UserServiceAsyncStub) -> list[tuple[str, str | None, bool]]:
    """Return the users without what the server adds, in the order of their ids."""
    return [
        (user.email, user.full_name if user.HasField("full_name") else None, user.is_active)
        for user in await list_users(users)
    ]


def counts(report: MirrorReport) -> tuple[int, ...]:
    """Return the numbers of users deleted, updated, created, and of failures."""
    return tuple(report.outcomes[name] for name in ("deleted", "updated", "created", "failed"))


async def test_makes_the_users_equal_to_the_file(
    roster: Roster, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Each kind of difference; the same file repairs a table that was changed."""
    for number in range(6):
        user = await users.CreateUser(CreateUserRequest(user=User(email=f"{number}@example.org")))
    await posts.CreatePost(CreatePostRequest(post=Post(title="t", author_id=user.id)))
    text = (
        "Mail;full_name;is_active;hashed_password;room\n"
        ' 0@Example.org;Zero;;;1\n1@example.org;"";;;1\n2@example.org;;no;;1\n3@example.org;;;?;1\n'
        f"new@example.org;New;f;{HASH};1\n"
    )
    (roster.folder / "people.csv").write_text(text)
    command = ("load", "users", "people.csv", "--columns", "email=Mail", "--mirror")

    refused = await roster.run(*command)
    dry = await roster.run(*command, "--max-deletes", "2", "--dry-run")
    before = await list_users(users)
    first = await roster.run(*command, "--max-deletes", "50%", "--json")
    after = await list_users(users)
    await users.DeleteUser(DeleteUserRequest(id=after[0].id))
    await users.CreateUser(CreateUserRequest(user=User(email="extra@example.org")))
    await users.UpdateUser(UpdateUserRequest(user=User(id=after[1].id, full_name="x")))
    second = await roster.run(*command, "--max-deletes", "1")

    plan = (
        "people.csv: 5 rows, 6 users in all: 2 to delete with 1 post, 3 to update, 1 to create, 1 unchanged\n"
    )
    assert (refused.status, dry.status, first.status, second.status) == (2, 0, 0, 0)
    assert (
        "2 of the 6 users (there is no --filter) would be deleted (33.3%), more than --max-deletes 10%"
        in refused.err
    )
    *deleted, last = dry.out.removeprefix(plan).splitlines()
    assert len(deleted) == 2
    assert all(line.removeprefix("  to delete: ") in refused.err for line in deleted)
    assert last == "dry run: nothing was written"
    assert [user.version for user in before] == 6 * [1]
    summary = json.loads(first.out)
    assert summary.pop("seconds") > 0
    assert summary == {
        "file": "people.csv",
        "rows": 5,
        "matching": 6,
        "planned": {"deletes": 2, "deleted_posts": 1, "updates": 3, "creates": 1},
        "dry_run": False,
        "deleted": 2,
        "deactivated": 0,
        "updated": 3,
        "created": 1,
        "skipped": 0,
        "failed": 0,
        "deleted_posts": 1,
        "unchanged": 1,
        "reasons": {},
        "rejects": None,
    }
    assert [(user.version, user.id) for user in after[:4]] == [
        (1 + (place < 3), user.id) for place, user in enumerate(before[:4])
    ]
    equal = {
        ("0@example.org", "Zero", True),
        ("1@example.org", "", True),
        ("2@example.org", None, False),
        ("3@example.org", None, True),
        ("new@example.org", "New", False),
    }
    assert set(await shown(users)) == equal
    assert "1 to delete, 1 to update, 1 to create, 3 unchanged\n" in second.out
    assert "ignored columns: room\n" in second.err


async def test_users_changed_after_the_plan_are_kept(mirror: MirrorRun, users: UserServiceAsyncStub) -> None:
    """Each is reported with its line, and the others are written; the next run sees them as they are."""
    text = "email,full_name\n0@example.org,new\n1@example.org,new\n2@example.org,new\n9@example.org,new\n"
    ids = [
        (await users.CreateUser(CreateUserRequest(user=User(email=f"{number}@example.org")))).id
        for number in range(6)
    ]

    async with mirror.planned(text) as report:
        for id in (ids[0], ids[3]):
            await users.UpdateUser(UpdateUserRequest(user=User(id=id, full_name="rival")))
        for id in (ids[1], ids[4]):
            await users.DeleteUser(DeleteUserRequest(id=id))
        await users.CreateUser(CreateUserRequest(user=User(email="9@example.org", full_name="rival")))

    assert counts(report) == (1, 1, 0, 4)
    assert report.outcomes["skipped"] == 1  # user 4 was to be deleted, and is
    assert await shown(users) == [
        ("0@example.org", "rival", True),
        ("2@example.org", "new", True),
        ("3@example.org", "rival", True),
        ("9@example.org", "rival", True),
    ]
    found = [json.loads(line) for line in mirror.rejects.read_text().splitlines()]
    assert [(row["not"], row["email"], row["_error"]["reason"], row["_error"]["row"]) for row in found] == [
        ("deleted", "3@example.org", "VERSION_MISMATCH", 0),
        ("updated", "0@example.org", "VERSION_MISMATCH", 2),
        ("updated", "1@example.org", "USER_NOT_FOUND", 3),
        ("created", "9@example.org", "EMAIL_TAKEN", 5),
    ]
    again = await mirror.run(text)
    assert counts(again) == (1, 2, 1, 0)
    assert {email for email, name, _ in await shown(users) if name == "new"} == {
        f"{number}@example.org" for number in (0, 1, 2, 9)
    }


async def test_filter_limits_what_is_changed(mirror: MirrorRun, users: UserServiceAsyncStub) -> None:
    """Others than the users that match stay."""
    for email in ("a@example.org", "b@example.org", "c@example.com"):
        await users.CreateUser(CreateUserRequest(user=User(email=email)))

    report = await mirror.run("email\nb@example.org\nd@example.org\n", filter='email = "*@example.org"')

    assert counts(report) == (1, 0, 1, 0)
    assert [email for email, *_ in await shown(users)] == ["b@example.org", "c@example.com", "d@example.org"]


async def test_deactivates_users_who_are_not_in_the_file(
    mirror: MirrorRun, users: UserServiceAsyncStub
) -> None:
    """Who comes back is active again, and who is inactive already is not written."""
    for number in range(3):
        await users.CreateUser(CreateUserRequest(user=User(email=f"{number}@example.org")))

    gone = await mirror.run("email\n0@example.org\n", deactivates=True)
    again = await mirror.run("email\n0@example.org\n", deactivates=True, limit="0")
    back = await mirror.run("email\n0@example.org\n2@example.org\n", deactivates=True, limit="0")

    assert (gone.outcomes["deactivated"], gone.planned_posts) == (2, 0)
    assert (again.counts.deletes, again.counts.updates) == (0, 0)
    assert counts(back) == (0, 1, 0, 0)
    assert [(user.is_active, user.version) for user in await list_users(users)] == [
        (True, 1),
        (False, 2),
        (True, 3),
    ]


async def test_by_id_emails_are_traded_across_batches(
    server: Server, mirror: MirrorRun, users: UserServiceAsyncStub
) -> None:
    """A ring of users who get the e-mail of the next one, in messages of two rows; a missing id is new."""
    ids = await add_users(server.database, 5)
    emails = [f"user{place}@example.org" for place in (1, 2, 3, 4, 0)]
    rows = [f"{id},{email}\n" for id, email in zip(ids, emails, strict=True)]
    text = "".join(["id,email\n", *rows, f"{ids[-1] + 7},new@example.org\n"])

    report = await mirror.run(text, key="id", batch_rows=2)

    assert counts(report) == (0, 5, 1, 0)
    assert [(user.id, user.email) for user in await list_users(users)] == [
        *zip(ids, emails, strict=True),
        (ids[-1] + 7, "new@example.org"),
    ]
    assert counts(await mirror.run(text, key="id")) == (0, 0, 0, 0)


@pytest.mark.parametrize("filter_", ["", 'email = "*@example.org"'])
async def test_run_that_stopped_after_parking_is_completed(
    server: Server, mirror: MirrorRun, users: UserServiceAsyncStub, filter_: str
) -> None:
    """The next run gives a parked user its e-mail, although the present one does not match the filter."""
    first, second = await add_users(server.database, 2)
    text = f"id,email\n{first},user1@example.org\n{second},user0@example.org\n"

    async with mirror.planned(text, key="id", filter=filter_):
        mirror.keep_steps("parked")
    parked = await list_users(users)
    again = await mirror.run(text, key="id", filter=filter_)

    assert parked[1].email.endswith("@parked.invalid")
    assert counts(again) == (0, 2, 0, 0)
    assert [user.email for user in await list_users(users)] == ["user1@example.org", "user0@example.org"]


async def test_parked_user_who_was_changed_is_kept(
    server: Server, mirror: MirrorRun, users: UserServiceAsyncStub
) -> None:
    """Its update fails too, although the version is the one that parking would have made."""
    first, second = await add_users(server.database, 2)
    text = f"id,email\n{first},user1@example.org\n{second},new@example.org\n"

    async with mirror.planned(text, key="id", batch_rows=1) as report:
        await users.UpdateUser(UpdateUserRequest(user=User(id=second, full_name="rival")))

    assert counts(report) == (0, 0, 0, 2)
    assert [user.email for user in await list_users(users)] == ["user0@example.org", "user1@example.org"]


async def test_users_with_many_posts_are_deleted_in_smaller_messages(
    server: Server, mirror: MirrorRun, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who has too many alone is named, before anything is written."""
    monkeypatch.setattr("service.db.deletion.MAX_DEPENDENTS", 3)
    ids = await add_users(server.database, 4)
    await add_posts(server.database, [id for id in ids for _ in range(2)])

    report = await mirror.run("email\nuser0@example.org\n")
    await add_posts(server.database, [ids[0], ids[0]])
    with pytest.raises(TooLarge, match=f"user {ids[0]}: .* 4 posts"):
        await mirror.run("email\nnew@example.org\n")

    assert (report.planned_posts, report.deleted_posts, *counts(report)) == (6, 6, 3, 0, 0, 0)
    assert [user.id for user in await list_users(users)] == ids[:1]


async def test_posts_are_counted_once_if_rows_are_validated_again(
    server: Server, mirror: MirrorRun, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third message has too many posts; smaller ones end elsewhere than the first two."""
    monkeypatch.setattr("service.db.deletion.MAX_DEPENDENTS", 3)
    ids = await add_users(server.database, 75)
    await add_posts(server.database, [ids[place] for place in (30, 60, 70) for _ in range(2)])

    report = await mirror.run("email\nnew@example.org\n", batch_rows=25)

    assert (report.planned_posts, report.deleted_posts) == (6, 6)


async def test_new_users_get_their_password(mirror: MirrorRun, users: UserServiceAsyncStub) -> None:
    """The hash of an existing user stays, because it can't be compared."""
    new, other = (f"email,hashed_password\na@example.org,{text}\n" for text in (HASH, HASH[:-1] + "u"))
    await mirror.run(new)

    report = await mirror.run(other)

    assert report.counts.unchanged == 1
    assert (await list_users(users))[0].version == 1


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_killed_runs_are_completed_by_the_same_command(
    server: Server, roster: Roster, users: UserServiceAsyncStub
) -> None:
    """Runs are killed with SIGKILL while they delete, update and create; nothing is left of their plans."""
    ids = await add_users(server.database, 200)
    kept = [{"email": f"user{number}@example.org", "full_name": "new"} for number in range(100)]
    added = [{"email": f"new{number}@example.org", "full_name": "new"} for number in range(100)]
    name = roster.write("people.ndjson", *kept, *added)
    command = ("load", "users", name, "--mirror", "--max-deletes", "100%", "--batch-rows", "2")

    async def is_deleting() -> bool:
        return await _is_missing(users, ids[100 + random.randrange(20)])

    async def is_updating() -> bool:
        page = await users.ListUsers(ListUsersRequest(filter='full_name = "new"', page_size=1))
        return bool(page.users)

    async def is_creating() -> bool:
        page = await users.ListUsers(ListUsersRequest(filter='email = "new*"', page_size=1))
        return bool(page.users)

    for has_begun in (is_deleting, is_updating, is_creating):
        await _kill_when(roster, command, has_begun)
    last = await roster.run(*command)

    assert last.status == 0, last.err
    assert sorted(await shown(users)) == sorted((row["email"], "new", True) for row in [*kept, *added])


async def _kill_when(
    roster: Roster, command: tuple[str, ...], condition: Callable[[], Awaitable[bool]]
) -> None:
    process = await roster.start(*command)
    await until(condition)
    if process.returncode is None:
        process.kill()
    await ended(process)


async def _is_missing(users: UserServiceAsyncStub, id: int) -> bool:
    return not (await users.ListUsers(ListUsersRequest(filter=f"id = {id}"))).users
