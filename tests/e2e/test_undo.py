"""`roster loads undo` deletes what a load created, and nothing else."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import func, select, text

from roster.errors import LoadNotFound
from roster.v1.bulk_pb2 import BulkLoad, BulkOptions
from roster.v1.posts_pb2 import (
    BulkCreatePostsRequest,
    CreatePostRequest,
    DeletePostRequest,
    ListPostsRequest,
    UpdatePostRequest,
)
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkDeleteUsersRequest,
    BulkUpdateUsersRequest,
    DeleteUserRequest,
    UpdateUserRequest,
    UserKey,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.cli.terminal import Target, UsageError
from service.cli.undo import Undo, undo_name
from service.db import deletion
from service.db.engine import Database
from service.loads.repository import expire_loads
from service.server import Server
from service.users import model
from tests.support.command import Ended, Roster
from tests.support.load_stream import LOAD_ID, LoadStream, load_once
from tests.support.rows import add_posts, add_users
from tests.support.users import list_names

OLD = Timestamp(seconds=1_700_000_000)
# What only the command decides.
on_one_database = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


async def loaded(users: UserServiceAsyncStub, *messages: Sequence[str], **options: Any) -> list[int]:
    """Complete a load of users, a message for each sequence of names, and return the ids."""
    stream = await LoadStream.open(users, **options)
    ids = [id for names in messages for id in (await stream.acknowledged(*names)).ids]
    await stream.finished()
    return ids


async def change(users: UserServiceAsyncStub, id: int) -> None:
    await users.UpdateUser(UpdateUserRequest(user=User(id=id, full_name="Changed")))


async def add_post(posts: PostServiceAsyncStub, author_id: int) -> int:
    post = await posts.CreatePost(CreatePostRequest(post=Post(author_id=author_id, title="Notes")))
    return post.id


async def count_users(database: Database) -> int:
    async with database.read() as session:
        return await session.scalar(select(func.count()).select_from(model.User)) or 0


def objects(done: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


async def test_deletes_only_what_the_load_created(
    roster: Roster, users: UserServiceAsyncStub, server: Server
) -> None:
    """Not the users that it skipped, nor those of others."""
    await add_users(server.database, 2)
    names = [f"new{number}" for number in range(2500)]
    await loaded(users, ["user1", "no one", *names[:1250]], [*names[1250:], "new7"], on_conflict="SKIP")
    await LoadStream.open(users, "other")

    done = await roster.run("loads", "undo", LOAD_ID, "--yes")
    again = await roster.run("loads", "undo", LOAD_ID, "--yes")

    created = "load staff created 2,500 users: "
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"{created}2,500 users would be deleted, 0 already gone, 0 would be kept\n"
        f"{created}2,500 users deleted, 0 already gone, 0 kept\n"
    )
    assert await list_names(users) == ["user0", "user1"]
    assert again.status == 0
    assert again.out == (
        f"{created}0 users would be deleted, 2,500 already gone, 0 would be kept\nnothing was deleted\n"
    )


async def test_keeps_rows_that_changed_and_users_with_posts(
    roster: Roster, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Also if it happens after the dry run. Another run deletes those whose obstacles are gone."""
    ids = await loaded(users, ["no one", *(f"new{number}" for number in range(2000))])
    await change(users, ids[1])
    await add_post(posts, ids[2])
    undo = await roster.start("loads", "undo", LOAD_ID, "--json")
    assert undo.stdin
    assert undo.stderr
    assert await undo.stderr.readuntil(b"[y/N]:") == b"Delete 1,998 users? This can't be undone. [y/N]:"
    await change(users, ids[3])
    post = await add_post(posts, ids[4])
    await users.DeleteUser(DeleteUserRequest(id=ids[5]))
    out, _ = await undo.communicate(b"y\n")

    *kept, summary = [json.loads(line) for line in out.splitlines()]
    reasons = {1: "VERSION_MISMATCH", 2: "USER_HAS_POSTS", 3: "VERSION_MISMATCH", 4: "USER_HAS_POSTS"}
    assert undo.returncode == 1
    assert [(row["offset"], row["id"], row["reason"]) for row in kept if not row["dry_run"]] == [
        (offset, ids[offset], reason) for offset, reason in reasons.items()
    ]
    assert (summary["deleted"], summary["gone"], summary["kept"]) == (1995, 1, 4)
    assert await list_names(users) == ["new0", "new1", "new2", "new3"]

    shown = await roster.run("loads", "show", summary["undo_id"], "--json")
    assert [row["reason"] for row in objects(shown)[1:]] == [*reasons.values()]
    await posts.DeletePost(DeletePostRequest(id=post))
    second = await roster.run("loads", "undo", LOAD_ID, "--yes")
    assert second.status == 1
    assert f"  1 x USER_HAS_POSTS: the user has posts\n    offset 2: user {ids[2]}\n" in second.out
    assert await list_names(users) == ["new0", "new1", "new2"]
    forced = await roster.run("loads", "undo", LOAD_ID, "--yes", "--force")
    assert (forced.status, await list_names(users)) == (0, [])
    assert "3 users with 1 post deleted" in forced.out


@on_one_database
async def test_sends_fewer_rows_at_once_if_they_have_too_many_posts(
    roster: Roster, users: UserServiceAsyncStub, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who is kept may have any number of them."""
    monkeypatch.setattr(deletion, "MAX_DEPENDENTS", 3)
    ids = await loaded(users, [f"new{number}" for number in range(20)])
    await add_posts(server.database, [ids[3], ids[3], ids[9], *ids[12:16]])

    kept = await roster.run("loads", "undo", LOAD_ID, "--dry-run")
    done = await roster.run("loads", "undo", LOAD_ID, "--yes", "--force")

    assert "14 users would be deleted, 0 already gone, 6 would be kept" in kept.out
    assert "20 users with 7 posts deleted, 0 already gone, 0 kept" in done.out
    assert await list_names(users) == []


@on_one_database
async def test_knows_the_versions_that_the_load_left(roster: Roster, users: UserServiceAsyncStub) -> None:
    """Each row of the load with the same key has added one, in the same message or in a later one."""
    [existing] = await loaded(users, ["old"], load_id="earlier")
    mask = {"paths": ["full_name"]}
    messages = [["old", "a", "b", "a"], ["a", "c", "b", "old"], ["d"]]
    ids = await loaded(users, *messages, on_conflict="UPDATE", update_mask=mask)
    await change(users, ids[2])

    planned = await roster.run("loads", "undo", LOAD_ID, "--dry-run")
    done = await roster.run("loads", "undo", LOAD_ID, "--yes", "--json")

    assert "the load also made 5 updates: users that existed before keep these values" in planned.out
    assert ids[0] == existing
    assert [(row["offset"], row["id"]) for row in objects(done) if "offset" in row] == [(2, ids[2])] * 2
    assert await list_names(users) == ["old", "b"]


@on_one_database
async def test_keeps_restored_rows_that_may_have_changed(roster: Roster, users: UserServiceAsyncStub) -> None:
    """Version 1 and a time before the load show that a row has not changed."""
    stream = await LoadStream.open(users, restore=True)
    rows = [
        User(id=11, email="first@example.org"),
        User(id=12, email="old@example.org", version=7, updated_at=OLD),
        User(id=13, email="unclear@example.org", version=7),
        User(id=14, email="changed@example.org", version=7, updated_at=OLD),
        User(id=15, email="changed-first@example.org", updated_at=OLD),
    ]
    await stream.write(users=rows, finish=True)
    await stream.answer()
    await stream.summary()
    for id in (14, 15):
        await change(users, id)

    done = await roster.run("loads", "undo", LOAD_ID, "--yes")

    assert done.status == 1
    assert "2 users deleted, 0 already gone, 3 kept" in done.out
    assert "changed since the load, or it can't be ruled out\n    offset 2: user 13\n" in done.out
    assert await list_names(users) == ["unclear", "changed", "changed-first"]


async def test_undoes_a_load_of_posts(
    roster: Roster, users: UserServiceAsyncStub, posts: PostServiceAsyncStub
) -> None:
    """Their authors stay."""
    [author] = await loaded(users, ["a"], load_id="authors")
    rows = [Post(author_id=author, title=f"Post {number}") for number in range(3)]
    options = BulkOptions(load_id=LOAD_ID, return_ids=True)
    request = BulkCreatePostsRequest(options=options, posts=rows, finish=True)
    _, second, _ = (await load_once(posts.BulkCreatePosts, request)).ids
    await posts.UpdatePost(UpdatePostRequest(post=Post(id=second, title="Changed")))
    await add_post(posts, author)

    done = await roster.run("loads", "undo", LOAD_ID, "--yes")

    left = await posts.ListPosts(ListPostsRequest())
    assert done.status == 1
    assert f"offset 1: post {second}\n" in done.out
    assert [post.title for post in left.posts] == ["Changed", "Notes"]
    assert await list_names(users) == ["a"]


async def test_continues_after_a_kill(roster: Roster, users: UserServiceAsyncStub, server: Server) -> None:
    """The same command deletes the rest, and reports the rows of both runs."""
    messages = [[f"new{first + number}" for number in range(4000)] for first in range(0, 12_000, 4000)]
    ids = await loaded(users, *messages)
    await change(users, ids[0])
    command = ("loads", "undo", LOAD_ID, "--yes", "--json")
    killed = await roster.start(*command)
    while await count_users(server.database) == 12_000:
        assert killed.returncode is None
    async with server.database.begin() as session:
        if server.database.engine.dialect.name == "postgresql":
            await session.execute(text("LOCK TABLE users IN EXCLUSIVE MODE"))
        left = await count_users(server.database)
        killed.kill()
        await killed.wait()
    done = await roster.run(*command)

    *_, dry, kept, summary = objects(done)
    assert 0 < left < 12_000
    assert done.status == 1
    assert dry["deleted"] < 11_999
    assert (kept["offset"], kept["id"], kept["dry_run"]) == (0, ids[0], False)
    assert (summary["deleted"], summary["gone"], summary["kept"]) == (11_999, 0, 1)
    assert await list_names(users) == ["new0"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_refuses_other_loads(roster: Roster, users: UserServiceAsyncStub, server: Server) -> None:
    """The error says what to do; nothing is deleted."""
    ids = await loaded(users, ["a", "b"], load_id="created")
    await LoadStream.open(users, "open")
    update = BulkUpdateUsersRequest(
        options=BulkOptions(load_id="updated", update_mask=FieldMask(paths=["full_name"])),
        users=[User(id=ids[0], full_name="Ada")],
        finish=True,
    )
    delete = BulkDeleteUsersRequest(
        options=BulkOptions(load_id="deleted"), users=[UserKey(id=ids[1])], finish=True
    )
    await load_once(users.BulkUpdateUsers, update)
    await load_once(users.BulkDeleteUsers, delete)

    expected = {
        "open": "load open is still open; abort it first, with `roster loads abort open --caller anonymous`",
        "updated": "load updated updated users, and their former values are not stored; load them from",
        "deleted": "load deleted deleted users, and they are not stored any more; load them from",
    }
    for load_id, sentence in expected.items():
        with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
            await Undo.find(target(server), load_id, "", is_forced=True)
    with pytest.raises(LoadNotFound):
        await Undo.find(target(server), "missing", "", is_forced=True)
    async with server.database.begin() as session:
        await expire_loads(session, datetime.now(UTC) + timedelta(days=1))
    done = await roster.run("loads", "undo", "created", "--yes")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Error: load created has expired, ")


def target(server: Server) -> Target:
    """Return the server as the commands name it, without credentials."""
    return Target(server.address, None, None, None, None, None, None, insecure_token=False)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_asks_before_it_deletes(roster: Roster, users: UserServiceAsyncStub) -> None:
    """The end of the input is no answer: the status is 2."""
    await loaded(users, ["a"])
    done = await roster.run("loads", "undo", LOAD_ID)
    assert done.status == 2
    assert "nothing was deleted" in done.err
    assert await list_names(users) == ["a"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_undoes_the_load_of_another_caller(
    roster: Roster, users: UserServiceAsyncStub, server: Server
) -> None:
    """`--caller` says whose load is meant; other callers' loads of the same name are independent."""
    await loaded(users, ["a"])
    async with server.database.begin() as session:
        await session.execute(text("UPDATE bulk_loads SET caller = 'jwt:ada'"))
    await loaded(users, ["b"])

    done = await roster.run("loads", "undo", LOAD_ID, "--caller", "jwt:ada", "--yes")

    assert (done.status, await list_names(users)) == (0, ["b"])
    assert (await roster.run("loads", "undo", LOAD_ID, "--yes")).status == 0
    assert await list_names(users) == []


@on_one_database
async def test_file_of_an_undone_load_is_not_reported_as_loaded(
    roster: Roster, users: UserServiceAsyncStub
) -> None:
    """The same command would find the load finished. An undo that deleted nothing does not count."""
    (roster.folder / "users.csv").write_text("email\nada@example.org\n")
    await roster.run("load", "users", "users.csv", "--load-id", LOAD_ID)
    options = BulkOptions(load_id=undo_name(BulkLoad(load_id=LOAD_ID, caller="anonymous"), 1, is_forced=True))
    await load_once(users.BulkDeleteUsers, BulkDeleteUsersRequest(options=options, users=[UserKey(id=7)]))
    kept = await roster.run("load", "users", "users.csv", "--load-id", LOAD_ID)
    await roster.run("loads", "undo", LOAD_ID, "--yes")

    again = await roster.run("load", "users", "users.csv", "--load-id", LOAD_ID)
    other = await roster.run("load", "users", "users.csv", "--load-id", "again")

    assert (kept.status, again.status, other.status) == (0, 2, 0)
    assert f"the load {LOAD_ID} was undone by undo-{LOAD_ID}-" in again.err
    assert await list_names(users) == ["ada"]
