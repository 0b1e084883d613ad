"""Conflicts of batches with other writers, and COPY within a transaction."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.code_pb2 import UNAVAILABLE
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from roster.errors import DatabaseUnavailable
from roster.v1.bulk_pb2 import BulkAck, BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkDeleteUsersRequest,
    BulkUpdateUsersRequest,
    UserKey,
)
from service.bulk.operation import Operation
from service.bulk.stream import BulkStreams
from service.db.bulk import postgresql
from service.db.bulk.batch import Batch, Outcome
from service.db.bulk.writer import BulkWriter
from service.db.engine import Database
from service.posts.servicer import CREATE_POSTS
from service.settings import Settings
from service.users.model import User as UserRow
from service.users.repository import USERS
from service.users.servicer import CREATE_USERS, DELETE_USERS, UPDATE_USERS
from tests.support.rival import Rival, rival, until
from tests.support.rows import add_users, read_emails

# A batch whose rows are written, and that waits for the commit of the one before.
WAITING_FOR_COMMIT = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'idle in transaction' AND query LIKE 'COPY%'
"""
# New posts wait for it. Not FOR UPDATE, which Citus does only on the coordinator.
EXCLUDE_REFERENCES = "UPDATE users SET email = 'locked@example.org' WHERE id = {}"
COLUMNS: dict[str, list[Any]] = {"id": [7], "email": ["ada@example.org"]}


@pytest.fixture
async def served(postgresql_url: str) -> AsyncIterator[Database]:
    """A database on PostgreSQL."""
    database = Database(Settings(database_url=postgresql_url))
    yield database
    await database.close()


@pytest.fixture
async def other(postgresql_url: str) -> AsyncIterator[Rival]:
    """A concurrent session."""
    async with rival(postgresql_url) as other:
        yield other


async def acknowledged(database: Database, operation: Operation, *messages: Any) -> list[BulkAck]:
    """Run a stream and return its acks."""

    async def requests() -> AsyncIterator[Any]:
        for message in messages:
            yield message.SerializeToString()

    events = BulkStreams(database).run(requests(), operation)
    return [event.ack async for event in events if event.HasField("ack")]


def reasons(ack: BulkAck) -> list[tuple[int, str, int]]:
    return [(failure.offset, failure.reason, failure.existing_id) for failure in ack.failures]


async def test_rollback_removes_copied_rows(served: Database) -> None:
    """COPY bypasses SQLAlchemy, but runs in its transaction."""
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  (the error is raised inside)
        async with served.bulk() as session:
            await session.execute(select(1))
            await postgresql.insert_rows(session, UserRow, COLUMNS, None)
            raise ZeroDivisionError

    assert await read_emails(served) == []


async def test_refuses_copy_outside_a_transaction(served: Database) -> None:
    """A session sends BEGIN with its first statement only."""
    with pytest.raises(RuntimeError, match="would commit by itself"):
        async with served.bulk() as session:
            await postgresql.insert_rows(session, UserRow, COLUMNS, None)

    assert await read_emails(served) == []


async def test_insert_keeps_texts_and_times(database: Database) -> None:
    """Also separators, escapes and the null of COPY's text format."""
    names = [
        "tab\t",
        "line\nline\r\n",
        "\\",
        r"\N",
        r"\.",
        r"\t",
        "",
        "'\"",
        "\x01\x0b",
        "Zoë \U0001f600",
        None,
    ]
    first, last = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    size = len(names)
    columns = {
        "id": list(range(size, 0, -1)),
        "email": [f"{row}@example.org" for row in range(size)],
        "full_name": names,
        "is_active": [row % 2 == 0 for row in range(size)],
        "created_at": [first] * size,
        "updated_at": [last] * size,
    }
    stored = select(*(getattr(UserRow, name) for name in columns)).order_by(UserRow.id.desc())

    async with database.bulk() as session:
        await session.execute(select(1))
        await BulkWriter(session, USERS)._dialect.insert_rows(session, UserRow, columns, "email")

    async with database.read() as session:
        found = (await session.execute(stored)).all()
    assert list(zip(*columns.values(), strict=True)) == [tuple(row) for row in found]


async def test_retry_undoes_the_failed_attempt(database: Database) -> None:
    """Its writes are rolled back, and its failures are dropped."""
    batch = Batch(1)
    attempts: list[Batch] = []

    async def attempt(batch: Batch) -> Outcome:
        attempts.append(batch)
        assert batch.failures == {}
        await session.execute(insert(UserRow).values(email=f"{len(attempts)}@example.org"))
        batch.fail(0, DatabaseUnavailable("from this attempt"))
        if len(attempts) == 1:
            raise IntegrityError(None, None, Exception())
        return Outcome.of_failed_batch(batch)

    async with database.bulk() as session:
        writer = BulkWriter(session, USERS)
        outcome = await writer.retry_on_conflict(batch, attempt)

    assert await read_emails(database) == ["2@example.org"]
    assert (len(attempts), outcome.failures) == (2, attempts[1].failures)


async def test_retries_are_limited(database: Database) -> None:
    """A batch that always loses to another writer fails with an error that can be retried."""

    async def attempt(batch: Batch) -> Outcome:
        raise IntegrityError(None, None, Exception())

    with pytest.raises(DatabaseUnavailable):
        async with database.bulk() as session:
            await BulkWriter(session, USERS).retry_on_conflict(Batch(1), attempt)


RACES = [
    (BulkOptions(), {"created": 1, "failed": 1}, None),
    (BulkOptions(on_conflict=BulkOptions.SKIP), {"created": 1, "skipped": 1}, None),
    (
        BulkOptions(on_conflict=BulkOptions.UPDATE, update_mask=FieldMask(paths=["full_name"])),
        {"created": 1, "updated": 1},
        "Ours",
    ),
    (BulkOptions(atomicity=BulkOptions.BATCH), {"failed": 2}, None),
]


@pytest.mark.parametrize(("options", "counts", "full_name"), RACES)
async def test_detects_key_taken_during_write(
    served: Database, other: Rival, options: BulkOptions, counts: dict[str, int], full_name: str | None
) -> None:
    """If another writer inserts the e-mail first, the row fails, is skipped, or updates."""
    await other.execute("INSERT INTO users (email) VALUES ('bob@example.org')")
    rows = [User(email=f"{name}@example.org", full_name="Ours") for name in ("ada", "bob")]
    request = BulkCreateUsersRequest(options=options, users=rows)
    request.options.return_ids = True
    load = asyncio.create_task(acknowledged(served, CREATE_USERS, request))
    await other.wait_for_blocked()
    await other.commit()

    (ack,) = await load

    async with served.read() as session:
        bob = (await session.scalars(select(UserRow).where(UserRow.email == "bob@example.org"))).one()
    assert {name: getattr(ack, name) for name in counts} == counts
    assert reasons(ack) == ([(1, "EMAIL_TAKEN", bob.id)] if ack.failed else [])
    assert ack.ids[1] == (0 if ack.failed else bob.id)
    assert bob.full_name == full_name
    assert ("ada@example.org" in await read_emails(served)) == (ack.created == 1)


async def test_creates_row_if_other_writer_rolls_back(served: Database, other: Rival) -> None:
    """The row waits for the other transaction."""
    await other.execute("INSERT INTO users (email) VALUES ('ada@example.org')")
    request = BulkCreateUsersRequest(users=[User(email="ada@example.org")])
    load = asyncio.create_task(acknowledged(served, CREATE_USERS, request))
    await other.wait_for_blocked()
    await other.rollback()

    (ack,) = await load

    assert (ack.created, await read_emails(served)) == (1, ["ada@example.org"])


async def test_detects_email_taken_during_update(served: Database, other: Rival) -> None:
    """Only the row that wants the e-mail fails, with the id of its owner."""
    first, second = await add_users(served, 2)
    await other.execute("INSERT INTO users (id, email) VALUES (77, 'ada@example.org')")
    rows = [User(id=first, email="ada@example.org"), User(id=second, email="bob@example.org")]
    request = BulkUpdateUsersRequest(options=BulkOptions(update_mask=FieldMask(paths=["email"])), users=rows)
    load = asyncio.create_task(acknowledged(served, UPDATE_USERS, request))
    await other.wait_for_blocked()
    await other.commit()

    (ack,) = await load

    assert (ack.updated, reasons(ack)) == (1, [(0, "EMAIL_TAKEN", 77)])
    assert await read_emails(served) == ["user0@example.org", "bob@example.org", "ada@example.org"]


async def test_detects_version_changed_during_update(served: Database, other: Rival) -> None:
    """A row with an expected version waits for a concurrent update, then fails."""
    (id,) = await add_users(served)
    await other.execute("UPDATE users SET version = version + 1")
    options = BulkOptions(update_mask=FieldMask(paths=["is_active"]))
    rows = [User(id=id, is_active=False, version=1), User(id=id, is_active=False, version=2)]
    request = BulkUpdateUsersRequest(options=options, users=rows)
    load = asyncio.create_task(acknowledged(served, UPDATE_USERS, request))
    await other.wait_for_blocked()
    await other.commit()

    (ack,) = await load

    assert (ack.updated, reasons(ack)) == (1, [(0, "VERSION_MISMATCH", 0)])


async def test_detects_author_deleted_during_write(served: Database, other: Rival) -> None:
    """The posts of other authors are written."""
    first, second, third = await add_users(served, 3)
    await other.execute(f"DELETE FROM users WHERE id IN ({second}, {third})")
    authors = [Post(author_id=first), Post(author_id=second), Post(author_email="user2@example.org")]
    request = BulkCreatePostsRequest(posts=authors)
    for post in request.posts:
        post.title = "Notes"
    load = asyncio.create_task(acknowledged(served, CREATE_POSTS, request))
    await other.wait_for_blocked()
    await other.commit()

    (ack,) = await load

    assert (ack.created, ack.failed) == (1, 2)
    assert {failure.reason for failure in ack.failures} == {"AUTHOR_NOT_FOUND"}


async def test_deletes_posts_that_are_committed_while_it_waits(served: Database, other: Rival) -> None:
    """They are counted, too: the posts are read once their author is locked."""
    [author, _] = await add_users(served, 2)
    await other.execute(f"INSERT INTO posts (title, content, author_id) VALUES ('Late', '', {author})")
    request = BulkDeleteUsersRequest(users=[UserKey(id=author)])
    load = asyncio.create_task(acknowledged(served, DELETE_USERS, request))
    await other.wait_for_blocked()
    await other.commit()

    (ack,) = await load

    assert (ack.deleted, ack.deleted_posts) == (1, 1)
    assert await read_emails(served) == ["user1@example.org"]


async def test_deletes_who_has_the_email_once_it_is_locked(served: Database, other: Rival) -> None:
    """A user whose e-mail changes while the delete waits is kept; its new owner is deleted."""
    first, second = await add_users(served, 2)
    await other.execute(f"UPDATE users SET email = 'kept@example.org' WHERE id = {first}")
    await other.execute(f"UPDATE users SET email = 'user0@example.org' WHERE id = {second}")
    request = BulkDeleteUsersRequest(
        options=BulkOptions(return_ids=True), users=[UserKey(email="user0@example.org")]
    )
    load = asyncio.create_task(acknowledged(served, DELETE_USERS, request))
    await other.wait_for_blocked()
    await other.commit()

    (ack,) = await load

    assert (ack.deleted, list(ack.ids)) == (1, [second])
    assert await read_emails(served) == ["kept@example.org"]


async def test_creates_with_crossing_keys_do_not_deadlock(
    served: Database, other: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    """In any order of rows, the second load waits for the first at its first key."""
    await other.execute("INSERT INTO users (email) VALUES ('bob@example.org')")
    rows = [User(email=f"{name}@example.org") for name in ("ada", "bob", "cyd")]
    options = BulkOptions(on_conflict=BulkOptions.SKIP)
    messages = [BulkCreateUsersRequest(options=options, users=users) for users in (rows[::-1], rows)]

    acks = await crossing(served, other, CREATE_USERS, messages)

    assert sorted((ack.created, ack.skipped) for ack in acks) == [(0, 3), (3, 0)]
    assert caplog.messages == []


async def test_updates_of_crossing_rows_do_not_deadlock(
    served: Database, other: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are locked in id order."""
    ids = await add_users(served, 3)
    await other.execute(f"UPDATE users SET version = version WHERE id = {ids[1]}")
    rows = [User(id=id, is_active=False) for id in ids]
    options = BulkOptions(update_mask=FieldMask(paths=["is_active"]))
    messages = [BulkUpdateUsersRequest(options=options, users=users) for users in (rows[::-1], rows)]

    acks = await crossing(served, other, UPDATE_USERS, messages)

    assert [ack.updated for ack in acks] == [3, 3]
    assert caplog.messages == []


async def test_posts_and_deletes_of_crossing_authors_do_not_deadlock(
    served: Database, other: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    """Both lock the authors in the order of their ids, of which the second here is 10 and the first 9."""
    await other.connection.execute("SELECT setval(pg_get_serial_sequence('users', 'id'), 8)")
    ids = await add_users(served, 3)
    assert [len(str(id)) for id in ids] == [1, 2, 2]
    await other.execute(EXCLUDE_REFERENCES.format(ids[1]))
    posts = BulkCreatePostsRequest(posts=[Post(author_id=id, title="Notes") for id in ids[::-1]])
    deletes = BulkDeleteUsersRequest(users=[UserKey(id=id) for id in ids[::-1]])
    load = asyncio.create_task(acknowledged(served, CREATE_POSTS, posts))
    waiting = await other.wait_for_blocked()
    delete = asyncio.create_task(acknowledged(served, DELETE_USERS, deletes))
    await other.wait_for_blocked(waiting)
    await other.rollback()

    [created], [deleted] = await load, await delete

    assert (created.created, deleted.deleted, deleted.deleted_posts) == (3, 3, 3)
    assert caplog.messages == []


async def test_batch_gives_way_to_a_deadlock_that_the_database_cannot_see(
    served: Database, other: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    """The first batch waits for the rival, the rival for the second, and the second for the first."""
    first, second = await add_users(served, 2)
    await other.execute(EXCLUDE_REFERENCES.format(first))
    messages = [BulkCreatePostsRequest(posts=[Post(author_id=id, title="Notes")]) for id in (first, second)]
    load = asyncio.create_task(acknowledged(served, CREATE_POSTS, *messages))
    await other.wait_for_blocked()
    await until(lambda: other.count(WAITING_FOR_COMMIT))

    await other.execute(f"DELETE FROM users WHERE id = {second}")
    await other.commit()

    acks = await load
    assert [ack.created for ack in acks] == [1, 0]
    assert [reason for ack in acks for _, reason, _ in reasons(ack)] == ["AUTHOR_NOT_FOUND"]
    assert caplog.messages == []  # no lock_timeout


async def crossing(
    database: Database, other: Rival, operation: Operation, messages: Sequence[Any]
) -> list[BulkAck]:
    """Run two loads that wait for a lock of the other session, release it, and return their acks."""
    first = asyncio.create_task(acknowledged(database, operation, messages[0]))
    waiting = await other.wait_for_blocked()
    second = asyncio.create_task(acknowledged(database, operation, messages[1]))
    await other.wait_for_blocked(waiting)
    await other.rollback()
    return [*await first, *await second]


async def test_locked_key_refuses_the_batch_only(
    postgresql_url: str, other: Rival, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three attempts the ack has an error. The stream can continue at the watermark."""
    monkeypatch.setattr("service.db.engine.LOCK_TIMEOUT_SECONDS", 0.1)
    impatient = Database(Settings(database_url=postgresql_url))
    refused_once = asyncio.Event()
    await other.execute("INSERT INTO users (email) VALUES ('bob@example.org')")

    async def requests() -> AsyncIterator[bytes]:
        yield BulkCreateUsersRequest(users=[User(email="ada@example.org")]).SerializeToString()
        yield BulkCreateUsersRequest(
            users=[User(email="bob@example.org"), User(email="cyd@example.org")]
        ).SerializeToString()
        await refused_once.wait()
        await other.rollback()
        yield BulkCreateUsersRequest(users=[User(email="bob@example.org")], offset=1).SerializeToString()

    events = []
    async for event in BulkStreams(impatient).run(requests(), CREATE_USERS):
        events.append(event)
        if event.ack.HasField("error"):
            refused_once.set()
    await impatient.close()

    _, first, refused, last, _ = [event.ack for event in events]
    assert (refused.error.code, refused.offset, refused.next_offset) == (UNAVAILABLE, 1, 1)
    assert (first.created, last.created, last.next_offset) == (1, 1, 2)
