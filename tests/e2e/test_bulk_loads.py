"""Loads with a name: they outlive their streams, and every row has one outcome for good."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.code_pb2 import OUT_OF_RANGE
from sqlalchemy import text

from roster.v1.bulk_pb2 import (
    AbortBulkLoadRequest,
    BulkAck,
    BulkLoad,
    BulkOptions,
    BulkSummary,
    GetBulkLoadRequest,
    ListBulkLoadsRequest,
    RowFailure,
)
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from roster.v1.posts_pb2 import BulkCreatePostsRequest, ListPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceAsyncStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkUpdateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    GetUserRequest,
    ListUsersRequest,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.db.engine import Database
from service.loads.repository import expire_loads
from service.server import Server
from tests.support.errors import refusal
from tests.support.load_stream import LOAD_ID, LoadStream, gap, named, refused_to_open
from tests.support.rival import until

# What a transaction that has written its rows, and waits for its turn to commit, looks like.
WAITING_TO_COMMIT = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND state = 'idle in transaction' AND backend_xid IS NOT NULL"
)
MASK = FieldMask(paths=["full_name"])


@pytest.fixture
def loads(channel: grpc.aio.Channel) -> BulkServiceAsyncStub:
    """The client of BulkService."""
    return BulkServiceStub(channel)


@pytest.fixture
async def stream(users: UserServiceAsyncStub) -> LoadStream:
    """The first stream of a load."""
    return await LoadStream.open(users)


async def emails(users: UserServiceAsyncStub) -> list[str]:
    """Return the names of all users, in the order of their ids."""
    stored = (await users.ListUsers(ListUsersRequest(page_size=1000))).users
    return [user.email.removesuffix("@example.org") for user in stored]


async def state(loads: BulkServiceAsyncStub) -> str:
    load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
    return BulkLoad.State.Name(load.state)


def rows(acks: list[BulkAck]) -> tuple[list[int], list[RowFailure], list[int]]:
    """Return what acks told in all: ids, failures, and how many were created, updated, skipped, failed."""
    ids = [id for ack in acks for id in ack.ids]
    failures = [failure for ack in acks for failure in ack.failures]
    counts = [sum(getattr(ack, name) for ack in acks) for name in ("created", "updated", "skipped", "failed")]
    return ids, failures, counts


async def test_a_load_goes_on_behind_its_last_row(users: UserServiceAsyncStub, stream: LoadStream) -> None:
    """Whoever opens it again is told where: behind the last row that was acknowledged."""
    await stream.acknowledged("a", "b", "no one")

    again = await LoadStream.open(users)
    ack = await again.acknowledged("c", offset=3)

    assert (stream.opened.load_id, stream.opened.next_offset) == (LOAD_ID, 0)
    assert (again.opened.load_id, again.opened.next_offset) == (LOAD_ID, 3)
    assert (ack.offset, ack.next_offset, ack.created, ack.replayed) == (3, 4, 1, False)
    assert await again.finished() == BulkSummary(next_offset=4, created=3, failed=1, state=BulkLoad.FINISHED)


async def test_the_first_message_begins_at_row_0_where_it_has_no_offset(
    users: UserServiceAsyncStub, stream: LoadStream
) -> None:
    """Also in a load that goes on: the same lines typed again do nothing twice."""
    first = await stream.acknowledged("a", "b")

    again = await LoadStream.open(users)
    replayed, new = await again.acknowledged("a", "b"), await again.acknowledged("c")

    assert (replayed.offset, replayed.replayed, replayed.ids) == (0, True, first.ids)
    assert (new.offset, new.replayed, new.created) == (2, False, 1)
    assert await emails(users) == ["a", "b", "c"]


async def test_rows_sent_again_have_their_first_outcome(
    users: UserServiceAsyncStub, stream: LoadStream
) -> None:
    """Ids and failures included, however they are cut this time; nothing is written."""
    names = ["a", "b", "a", "no one", "c", "b"]
    first = [await stream.acknowledged(*names[offset : offset + 3]) for offset in (0, 3)]
    assert [failure.offset for ack in first for failure in ack.failures] == [2, 3, 5]

    for cuts in ([0, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 5, 6], [0, 5, 6]):
        again = await LoadStream.open(users)
        acks = [await again.acknowledged(*names[begin:end], offset=begin) for begin, end in pairwise(cuts)]

        assert rows(acks) == rows(first)
        assert all(ack.replayed and ack.next_offset == 6 for ack in acks)
    assert await emails(users) == ["a", "b", "c"]


async def test_a_first_outcome_is_one_for_good(users: UserServiceAsyncStub, stream: LoadStream) -> None:
    """It is what was, not what is: the users may have changed meanwhile, and the rows sent may differ."""
    first = await stream.acknowledged("a", "b", "a")
    await users.DeleteUser(DeleteUserRequest(id=first.ids[0]))

    again = await stream.acknowledged("x", "no one", "b", offset=0)

    assert again == BulkAck(
        next_offset=3, replayed=True, created=2, failed=1, ids=first.ids, failures=first.failures
    )
    assert await emails(users) == ["b"]


async def test_only_new_rows_of_a_message_are_written(
    users: UserServiceAsyncStub, stream: LoadStream
) -> None:
    """One that begins below the watermark and ends above it has an outcome for each row all the same."""
    first = await stream.acknowledged("a", "a", "b")

    both = await stream.acknowledged("x", "x", "c", "no one", offset=1)

    assert (both.offset, both.next_offset, both.replayed) == (1, 5, False)
    assert (both.created, both.failed) == (2, 2)
    assert both.ids[:2] == first.ids[1:]
    assert [(failure.offset, failure.reason) for failure in both.failures] == [
        (1, "EMAIL_TAKEN"),
        (4, "INVALID_FIELD"),
    ]
    assert await emails(users) == ["a", "b", "c"]


async def test_rows_ahead_are_a_gap(users: UserServiceAsyncStub, stream: LoadStream) -> None:
    """They aren't written; the stream stays open and says where to go on."""
    await stream.acknowledged("a")

    ahead = await stream.acknowledged("c", offset=2)
    finish = await stream.acknowledged(offset=2, finish=True)
    back = await stream.acknowledged("b", offset=1)

    assert gap(ahead) == gap(finish) == (OUT_OF_RANGE, "OFFSET_GAP", "1")
    assert (back.next_offset, back.created) == (2, 1)
    assert await emails(users) == ["a", "b"]


async def test_a_newer_stream_fences_the_older_one_off(
    users: UserServiceAsyncStub, stream: LoadStream
) -> None:
    """What the older one sends then isn't written, nor does it end the load; nothing is doubled."""
    idle = stream
    await idle.acknowledged("a")
    older = await LoadStream.open(users)
    newer = await LoadStream.open(users)
    await newer.acknowledged("b", offset=1)

    refused = [await older.refused("b", "c", offset=1), await idle.refused(finish=True)]
    await newer.acknowledged("c", offset=2)

    for refusal_ in refused:
        assert (refusal_.code, refusal_.reason) == (grpc.StatusCode.ABORTED, "LOAD_FENCED")
    assert await newer.finished() == BulkSummary(next_offset=3, created=3, state=BulkLoad.FINISHED)
    assert await emails(users) == ["a", "b", "c"]


async def test_a_stream_can_be_fenced_off_with_batches_in_hand(
    users: UserServiceAsyncStub, stream: LoadStream
) -> None:
    """Each of them is wholly in or wholly out, and the newer stream is told which."""
    names = [f"user{number}" for number in range(601)]
    for offset in (0, 200, 400):
        await stream.write(users=named(*names[offset : offset + 200]))

    newer = await LoadStream.open(users)
    begin = newer.opened.next_offset
    await newer.acknowledged(*names[begin:], offset=begin)

    assert begin % 200 == 0
    assert (await newer.finished()).created == 601
    assert sorted(await emails(users)) == sorted(names)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_batches_are_committed_in_the_order_of_their_offsets(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream
) -> None:
    """They are copied at the same time, but none is in before the one that it follows."""
    async with server.database.begin() as blocker:
        await blocker.execute(text("INSERT INTO users (email) VALUES ('a@example.org')"))
        await stream.write(users=named("a"))
        await stream.write(users=named("b"))
        await until(lambda: _waits(server.database))
        load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))
        assert (load.next_offset, await emails(users)) == (0, [])

    first, second = (await stream.answer()).ack, (await stream.answer()).ack
    assert (first.offset, first.next_offset, first.failed) == (0, 1, 1)
    assert (second.offset, second.next_offset, second.created) == (1, 2, 1)


async def _waits(database: Database) -> bool:
    async with database.read() as session:
        count = await session.scalar(WAITING_TO_COMMIT)
    return bool(count == 2)  # the second batch, and the test's own blocker


async def test_loads_with_crossing_keys_both_come_to_their_end(users: UserServiceAsyncStub) -> None:
    """Whichever is first with a name has it, the other skips it, and neither dies of the other."""
    names = [f"user{number:03}" for number in range(400)]
    streams = [await LoadStream.open(users, load_id=id, on_conflict="SKIP") for id in ("up", "down")]
    for begin in range(0, 400, 100):
        await streams[0].write(users=named(*names[begin : begin + 100]))
        await streams[1].write(users=named(*names[300 - begin : 400 - begin][::-1]))

    acks = [(await stream.answer()).ack for stream in streams for _ in range(4)]

    assert sum(ack.created for ack in acks) == sum(ack.skipped for ack in acks) == 400
    assert sorted(await emails(users)) == names


async def test_finishing_again_returns_the_first_summary(
    users: UserServiceAsyncStub, stream: LoadStream
) -> None:
    """Rows that the load has may come again too, with their first outcome."""
    first = await stream.acknowledged("a", "b", "b")
    summary = await stream.finished()

    again = await LoadStream.open(users)
    replayed = await again.acknowledged("a", "b", "b")

    assert summary == BulkSummary(next_offset=3, created=2, failed=1, state=BulkLoad.FINISHED)
    assert (again.opened.next_offset, replayed.replayed, replayed.ids) == (3, True, first.ids)
    assert await again.finished() == summary
    assert await (await LoadStream.open(users)).finished(offset=3) == summary


async def test_a_finished_load_takes_no_new_rows(users: UserServiceAsyncStub, stream: LoadStream) -> None:
    """Neither behind its rows nor in a message that has some of them."""
    await stream.acknowledged("a")
    await stream.finished()

    for offset, names in [(1, ["b"]), (0, ["a", "b"])]:
        refused = await (await LoadStream.open(users)).refused(*names, offset=offset)
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LOAD_FINISHED")

    assert await emails(users) == ["a"]


async def test_nothing_is_written_behind_the_end(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream
) -> None:
    """Rows that come behind `finish`, new ones or some of them, are no part of the load."""
    await stream.write(users=named("a", "b"), finish=True)
    await stream.write(users=named("c"))
    await stream.write(users=named("b", "c"), offset=1)

    ack, summary = (await stream.answer()).ack, await stream.summary()

    assert (ack.created, summary) == (2, BulkSummary(next_offset=2, created=2, state=BulkLoad.FINISHED))
    assert await emails(users) == ["a", "b"]


async def test_a_half_close_leaves_a_load_open(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream
) -> None:
    """The end of a stream completes nothing; its summary says so, with the numbers of all its streams."""
    await stream.acknowledged("a", "no one")
    await stream.half_closed()
    again = await LoadStream.open(users)
    await again.acknowledged("b", offset=2)

    assert await again.half_closed() == BulkSummary(next_offset=3, created=2, failed=1, state=BulkLoad.OPEN)
    assert await state(loads) == "OPEN"


async def test_a_cancelled_client_leaves_a_load_open(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream
) -> None:
    """To the server it looks like a clean end: what was acknowledged is in, and the load goes on."""
    await stream.acknowledged("a")
    await stream.write(users=named("b", "c"))
    stream.call.cancel()
    await server.drain.wait(10)

    assert await state(loads) == "OPEN"
    again = await LoadStream.open(users)
    assert again.opened.next_offset in (1, 3)
    assert await emails(users) == ["a", "b", "c"][: again.opened.next_offset]


CHANGED: list[dict[str, Any]] = [
    {"on_conflict": "SKIP"},
    {"on_conflict": "UPDATE", "update_mask": MASK},
    {"atomicity": "BATCH"},
    {"restore": True},
]


async def test_a_load_keeps_its_options(users: UserServiceAsyncStub, stream: LoadStream) -> None:
    """A stream that wants others isn't opened, and fences nobody off."""
    for options in CHANGED:
        refused = await refused_to_open(users, **options)
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OPTIONS_CHANGED")

    assert (await stream.acknowledged("a")).created == 1


async def test_a_load_keeps_its_mask(users: UserServiceAsyncStub) -> None:
    """Which fields an update writes is one of the options."""
    await LoadStream.open(users, on_conflict="UPDATE", update_mask=MASK)

    refused = await refused_to_open(users, on_conflict="UPDATE", update_mask={"paths": ["is_active"]})

    assert refused.reason == "OPTIONS_CHANGED"


async def test_a_load_keeps_its_operation(users: UserServiceAsyncStub, posts: PostServiceAsyncStub) -> None:
    """A name that one RPC has begun is no other's."""
    await LoadStream.open(users)
    others: list[Any] = [
        users.BulkUpdateUsers(
            iter([BulkUpdateUsersRequest(options=BulkOptions(load_id=LOAD_ID, update_mask=MASK))])
        ),
        posts.BulkCreatePosts(iter([BulkCreatePostsRequest(options=BulkOptions(load_id=LOAD_ID))])),
    ]

    for call in others:
        assert (await refusal(call.read())).reason == "OPTIONS_CHANGED"


async def test_what_is_told_may_change(users: UserServiceAsyncStub, stream: LoadStream) -> None:
    """`return_ids` and `max_failures` are the stream's, not the load's."""
    await stream.acknowledged("a")

    again = await LoadStream.open(users, return_ids=False, max_failures=1)
    ack = await again.acknowledged("a")

    assert (ack.replayed, ack.created, ack.ids) == (True, 1, [])


async def test_an_aborted_load_is_at_its_end(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream
) -> None:
    """Its stream is fenced off, none is opened again, and what was acknowledged stays."""
    await stream.acknowledged("a")
    await loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=LOAD_ID))

    running, new = await stream.refused("b"), await refused_to_open(users)

    assert (running.code, running.reason) == (grpc.StatusCode.ABORTED, "LOAD_FENCED")
    assert (new.code, new.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LOAD_ABORTED")
    assert (await state(loads), await emails(users)) == ("ABORTED", ["a"])


@pytest.mark.parametrize("finish", [False, True])
async def test_a_load_expires(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream, finish: bool
) -> None:
    """Seven days after its last batch its outcomes are dropped; it stays, so that none begins twice."""
    await stream.acknowledged("a", "a", finish=finish)
    later = Server(server.settings, lambda: datetime.now(UTC) + timedelta(days=8))
    await later.start()
    await until(lambda: is_expired(loads))
    await later.stop(grace=0)

    refused = await refused_to_open(users)
    load = await loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID))

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LOAD_EXPIRED")
    assert (load.next_offset, load.created, load.failed) == (2, 1, 1)


async def test_a_load_that_expires_tells_no_outcomes(
    server: Server, users: UserServiceAsyncStub, loads: BulkServiceAsyncStub, stream: LoadStream
) -> None:
    """Neither right ones nor wrong ones, also to a stream that was opened in time."""
    await stream.acknowledged("a")
    async with server.database.begin() as session:
        await expire_loads(session, datetime.now(UTC) + timedelta(days=1))

    refused = await stream.refused("a", offset=0)

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LOAD_EXPIRED")


async def is_expired(loads: BulkServiceAsyncStub) -> bool:
    return await state(loads) == "EXPIRED"


async def test_validation_leaves_no_load(users: UserServiceAsyncStub, loads: BulkServiceAsyncStub) -> None:
    """It records nothing, whatever the name: no load begins, and none is touched."""
    validating = await LoadStream.open(users, validate_only=True)
    ack = await validating.acknowledged("a", "no one")
    summary = await validating.finished()
    missing = await refusal(loads.GetBulkLoad(GetBulkLoadRequest(load_id=LOAD_ID)))
    writing = await LoadStream.open(users)
    await LoadStream.open(users, validate_only=True)

    assert (ack.created, ack.failed, ack.ids) == (1, 1, [0, 0])
    assert summary == BulkSummary(next_offset=2, created=1, failed=1, state=BulkLoad.FINISHED)
    assert missing.reason == "LOAD_NOT_FOUND"
    assert (await writing.acknowledged("a")).created == 1


async def test_too_many_failures_leave_a_load_open(users: UserServiceAsyncStub) -> None:
    """A summary comes first. Whoever goes on has his own count, in which replayed rows have no part."""
    stream = await LoadStream.open(users, max_failures=1)
    await stream.acknowledged("a", "a")
    await stream.acknowledged("a", "b")
    summary = await stream.summary()
    refused = await refusal(stream.answer())

    again = await LoadStream.open(users, max_failures=1)
    await again.acknowledged("a", "a", "a", "b")
    await again.acknowledged("a", "c")

    assert summary == BulkSummary(next_offset=4, created=2, failed=2, state=BulkLoad.OPEN)
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_FAILURES")
    assert await again.finished() == BulkSummary(next_offset=6, created=3, failed=3, state=BulkLoad.FINISHED)


async def test_a_batch_that_failed_as_a_whole_has_failed_for_good(users: UserServiceAsyncStub) -> None:
    """Its rows fail again however they are cut, and only the culprits are told, as at first."""
    stream = await LoadStream.open(users, atomicity="BATCH")
    first = await stream.acknowledged("a", "no one", "b")
    second = await stream.acknowledged("b", "c")

    again = await LoadStream.open(users, atomicity="BATCH")
    acks = [
        await again.acknowledged(*names, offset=offset)
        for offset, names in [(0, ["a"]), (1, ["no one", "b", "b"]), (4, ["c"])]
    ]

    assert rows(acks) == rows([first, second])
    assert [(ack.created, ack.failed) for ack in acks] == [(0, 1), (1, 2), (1, 0)]
    assert await emails(users) == ["b", "c"]


@pytest.mark.parametrize("options", [{"on_conflict": "SKIP"}, {"on_conflict": "UPDATE", "update_mask": MASK}])
async def test_what_was_skipped_or_updated_is_so_once(
    users: UserServiceAsyncStub, options: dict[str, Any]
) -> None:
    """Sent again, the rows have the ids and counts that they had, and no user changes."""
    await users.CreateUser(CreateUserRequest(user=named("a")[0]))
    stream = await LoadStream.open(users, **options)
    names = ["b", "a", "b", "no one", "a"]
    first = await stream.acknowledged(*names)
    before = (await users.ListUsers(ListUsersRequest())).users

    again = await LoadStream.open(users, **options)
    acks = [
        await again.acknowledged(*names[begin : begin + 2], offset=begin) for begin in range(0, len(names), 2)
    ]

    assert rows(acks) == rows([first])
    assert (first.created, first.skipped + first.updated, first.failed) == (1, 3, 1)
    assert (await users.ListUsers(ListUsersRequest())).users == before


async def test_an_update_is_done_once(users: UserServiceAsyncStub) -> None:
    """Sent again, its rows are answered alike, and the version has grown by one."""
    ada = await users.CreateUser(CreateUserRequest(user=named("ada")[0]))
    options = BulkOptions(load_id=LOAD_ID, update_mask=MASK, return_ids=True)
    changes = [User(id=ada.id, full_name="Ada", version=1), User(id=ada.id + 1, full_name="Bob")]

    async def settled() -> BulkAck:
        request = BulkUpdateUsersRequest(options=options, users=changes)
        _, event, _ = [event async for event in users.BulkUpdateUsers(iter([request]))]
        return event.ack

    first, again = await settled(), await settled()

    assert (first.updated, first.failed, first.ids) == (1, 1, [ada.id, 0])
    assert (again.replayed, rows([again])) == (True, rows([first]))
    assert (await users.GetUser(GetUserRequest(id=ada.id))).version == 2


async def test_posts_are_created_once(users: UserServiceAsyncStub, posts: PostServiceAsyncStub) -> None:
    """The rules of a load are the same whatever its rows are."""
    ada = await users.CreateUser(CreateUserRequest(user=named("ada")[0]))
    options = BulkOptions(load_id=LOAD_ID, return_ids=True)
    sent = [Post(title="Notes", author_id=ada.id), Post(title="Notes", author_email="bob@example.org")]

    async def settled() -> BulkAck:
        request = BulkCreatePostsRequest(options=options, posts=sent)
        _, event, _ = [event async for event in posts.BulkCreatePosts(iter([request]))]
        return event.ack

    first, again = await settled(), await settled()

    assert (first.created, first.failed, again.replayed) == (1, 1, True)
    assert rows([again]) == rows([first])
    assert len((await posts.ListPosts(ListPostsRequest())).posts) == 1


async def test_a_name_has_255_characters_without_nul(users: UserServiceAsyncStub) -> None:
    """Others are refused, also where nothing would be recorded."""
    for load_id, validate_only in product(["x" * 256, "nul\0"], [False, True]):
        refused = await refused_to_open(users, load_id=load_id, validate_only=validate_only)
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["options.load_id"])


async def test_any_other_text_is_a_name(users: UserServiceAsyncStub) -> None:
    """It is taken as it is: two that look alike are two loads."""
    for load_id in ("\U0001d49c" * 255, "e\u0301", "\u00e9", " staff", "Staff"):
        stream = await LoadStream.open(users, load_id=load_id)
        assert (stream.opened.load_id, stream.opened.next_offset) == (load_id, 0)
        await stream.acknowledged(f"user{len(load_id.encode())}{load_id[0].isspace()}", offset=0)


async def test_a_load_without_a_name_is_kept_nowhere(
    users: UserServiceAsyncStub, loads: BulkServiceAsyncStub
) -> None:
    """It leaves its rows, and no load to go on with."""
    stream = await LoadStream.open(users, load_id="")
    await stream.acknowledged("a")
    again = await LoadStream.open(users, load_id="")

    assert (stream.opened.load_id, again.opened.next_offset) == ("", 0)
    assert not (await loads.ListBulkLoads(ListBulkLoadsRequest())).loads
