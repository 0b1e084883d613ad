"""The bulk-stream protocol: what is answered to which message, whatever the rows are."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import pytest
from google.rpc.code_pb2 import INVALID_ARGUMENT, OUT_OF_RANGE
from sqlalchemy import func, select

from roster.v1.bulk_pb2 import BulkLoad, BulkOptions, BulkSummary, BulkWriteResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.bulk.message import MAX_BYTES, MAX_ROWS
from service.bulk.pending import PendingBatch
from service.bulk.stream import BulkStreams
from service.db.engine import Database
from service.server import Server
from service.users.model import User as UserRow
from service.users.servicer import CREATE_USERS
from tests.support.errors import refusal
from tests.support.load_stream import LoadStream, gap, named

# Messages that a stream may have read and not yet answered.
IN_HAND = 3


@pytest.fixture
async def stream(users: UserServiceStub) -> LoadStream:
    """A stream that is open."""
    stream = LoadStream(users)
    await stream.send()
    await stream.answer()
    return stream


async def answered(users: UserServiceStub, *messages: BulkCreateUsersRequest) -> list[BulkWriteResponse]:
    """Send a whole load and return the events."""
    return [event async for event in users.BulkCreateUsers(iter(messages))]


async def stored(server: Server) -> int:
    """Return how many users are stored."""
    async with server.database.read() as session:
        return await session.scalar(select(func.count()).select_from(UserRow)) or 0


async def test_opens_with_the_limits(users: UserServiceStub) -> None:
    """The first event says where to begin and how large a message may be."""
    opened, *_ = await answered(users, BulkCreateUsersRequest(finish=True))

    assert opened.WhichOneof("event") == "opened"
    assert (opened.opened.next_offset, opened.opened.max_rows, opened.opened.max_bytes) == (0, 5000, 4 << 20)


async def test_opens_before_any_row_is_sent(users: UserServiceStub) -> None:
    """Options alone are answered at once: the client may wait for it."""
    stream = LoadStream(users)
    await stream.send(options=BulkOptions())

    assert (await stream.answer()).HasField("opened")


async def test_acknowledges_each_message_in_order(users: UserServiceStub) -> None:
    """Rows may ride with the options; every message with rows has an ack, and the end is a summary."""
    _, *acks, last = await answered(
        users,
        BulkCreateUsersRequest(options=BulkOptions(), users=named("a", "b")),
        BulkCreateUsersRequest(users=named("c", "d", "e")),
        BulkCreateUsersRequest(),
        BulkCreateUsersRequest(users=named("f"), finish=True),
    )

    assert [(answer.ack.offset, answer.ack.next_offset, answer.ack.created) for answer in acks] == [
        (0, 2, 2),
        (2, 5, 3),
        (5, 6, 1),
    ]
    assert last.summary == BulkSummary(next_offset=6, created=6, state=BulkLoad.FINISHED)


async def test_counts_each_row_once(users: UserServiceStub) -> None:
    """The summary adds up what the acks told."""
    *_, last = await answered(
        users,
        BulkCreateUsersRequest(options=BulkOptions(on_conflict=BulkOptions.SKIP), users=named("a", "b")),
        BulkCreateUsersRequest(users=[*named("b", "c"), User(email="nobody")], finish=True),
    )

    assert last.summary == BulkSummary(next_offset=5, created=3, skipped=1, failed=1, state=BulkLoad.FINISHED)


async def test_takes_explicit_offsets(stream: LoadStream) -> None:
    """A client may number its rows itself."""
    await stream.acknowledged("a", "b", offset=0)

    assert (await stream.acknowledged("c", offset=2)).next_offset == 3


async def test_refuses_a_gap_and_stays_open(stream: LoadStream) -> None:
    """Rows ahead of the watermark aren't written; the stream says where to go on, and does."""
    await stream.acknowledged("a")

    ahead = await stream.acknowledged("b", offset=5)
    back = await stream.acknowledged("b", offset=1)

    assert gap(ahead) == (OUT_OF_RANGE, "OFFSET_GAP", "1")
    assert (ahead.offset, ahead.next_offset, ahead.created) == (5, 1, 0)
    assert (back.next_offset, back.created) == (2, 1)


async def test_refuses_rows_below_the_watermark(server: Server, stream: LoadStream) -> None:
    """Without load_id outcomes aren't kept, so rows sent again can't be answered; nor are they written."""
    await stream.acknowledged("a", "b")

    again = await stream.acknowledged("x", offset=0)
    straddling = await stream.acknowledged("y", "z", offset=1)

    assert gap(again) == gap(straddling) == (OUT_OF_RANGE, "OFFSET_GAP", "2")
    assert await stored(server) == 2
    assert (await stream.acknowledged("c", offset=2)).next_offset == 3


async def test_what_was_sent_behind_a_refused_message_is_a_gap(server: Server, stream: LoadStream) -> None:
    """Messages without an offset follow the one before, written or not, until the client goes back."""
    await stream.acknowledged("a")
    await stream.send("b", offset=2)
    await stream.send("c")
    await stream.send("d", "e")
    await stream.send("f", offset=1)
    await stream.send("g")

    acks = [(await stream.answer()).ack for _ in range(5)]

    assert [(ack.offset, ack.next_offset, ack.error.code) for ack in acks] == [
        (2, 1, OUT_OF_RANGE),
        (3, 1, OUT_OF_RANGE),
        (4, 1, OUT_OF_RANGE),
        (1, 2, 0),
        (2, 3, 0),
    ]
    assert await stored(server) == 3


async def test_takes_5000_rows_and_no_more(stream: LoadStream) -> None:
    """One row more is told, and the stream stays open at the same place."""
    names = [f"user{number}" for number in range(MAX_ROWS + 1)]

    refused = await stream.acknowledged(*names)
    written = await stream.acknowledged(*names[1:], offset=0)

    assert (refused.error.code, refused.next_offset) == (INVALID_ARGUMENT, 0)
    assert (written.created, written.next_offset) == (MAX_ROWS, MAX_ROWS)


async def test_takes_4_mib_and_no_more(stream: LoadStream) -> None:
    """The limit is the size of the message on the wire, to the byte."""
    largest = BulkCreateUsersRequest(users=[*named("a"), User(full_name="")])
    largest.users[1].full_name = "x" * (MAX_BYTES - largest.ByteSize() - 6)
    assert largest.ByteSize() == MAX_BYTES
    larger = BulkCreateUsersRequest(users=largest.users)
    larger.users[1].full_name += "x"

    await stream.call.write(larger)
    refused = (await stream.answer()).ack
    await stream.call.write(BulkCreateUsersRequest(offset=0, users=named("b")))
    await stream.answer()
    await stream.call.write(largest)
    taken = (await stream.answer()).ack

    assert (refused.error.code, refused.next_offset) == (INVALID_ARGUMENT, 0)
    assert (taken.created, taken.failed, taken.next_offset) == (1, 1, 3)


async def test_a_half_close_is_no_success(users: UserServiceStub, server: Server) -> None:
    """Without finish the stream ends with a summary that says so; what was acknowledged is in."""
    *_, last = await answered(users, BulkCreateUsersRequest(users=named("a")))

    assert last.summary == BulkSummary(next_offset=1, created=1, state=BulkLoad.STATE_UNSPECIFIED)
    assert await stored(server) == 1


async def test_finish_behind_rows_that_were_not_written_completes_nothing(
    server: Server, stream: LoadStream
) -> None:
    """A load with a gap isn't complete: the stream stays open for the rows that are missing."""
    ahead = await stream.acknowledged("b", offset=1, finish=True)
    alone = await stream.acknowledged(finish=True)
    await stream.send("a", "b", offset=0, finish=True)
    written, summary = await stream.answer(), await stream.answer()

    assert gap(ahead) == gap(alone) == (OUT_OF_RANGE, "OFFSET_GAP", "0")
    assert written.ack.created == 2
    assert summary.summary == BulkSummary(next_offset=2, created=2, state=BulkLoad.FINISHED)


async def test_refuses_a_stream_without_messages(users: UserServiceStub) -> None:
    """There is nothing to do, and nothing is answered but that."""
    refused = await refusal(answered(users))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_OPTIONS")


async def test_refuses_options_after_the_first_message(server: Server, stream: LoadStream) -> None:
    """The stream ends, and what was acknowledged stays."""
    await stream.acknowledged("a")
    await stream.send("b", options=BulkOptions())

    refused = await refusal(stream.answer())

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_OPTIONS")
    assert await stored(server) == 1


async def test_too_many_failures_end_the_stream(server: Server, users: UserServiceStub) -> None:
    """A summary comes first; what was acknowledged stays."""
    stream = LoadStream(users)
    await stream.send("a", "a", "b", options=BulkOptions(max_failures=1))
    await stream.send("a", "c")

    _, first, second, last = [await stream.answer() for _ in range(4)]
    refused = await refusal(stream.answer())

    assert (first.ack.failed, second.ack.failed) == (1, 1)
    assert last.summary == BulkSummary(next_offset=5, created=3, failed=2)
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_FAILURES")
    assert await stored(server) == 3


async def test_sends_ids_only_where_asked(users: UserServiceStub) -> None:
    """`ids[i]` belongs to row i of the message, 0 where it failed; without `return_ids` there are none."""
    rows = [*named("c", "a"), User(email="nobody"), *named("b", "a")]
    options = BulkOptions(return_ids=True, on_conflict=BulkOptions.SKIP)

    _, told, _ = await answered(users, BulkCreateUsersRequest(options=options, users=rows))
    _, untold, _ = await answered(users, BulkCreateUsersRequest(users=rows))

    ids = [(await users.GetUser(GetUserRequest(email=row.email))).id for row in rows if "@" in row.email]
    assert told.ack.ids == [*ids[:2], 0, *ids[2:]]
    assert untold.ack.ids == []


async def test_takes_no_more_than_it_answers(database: Database) -> None:
    """A client that doesn't read is not read from, so that memory doesn't grow with the load."""
    taken = answered = 0

    async def requests() -> AsyncIterator[bytes]:
        nonlocal taken
        for number in range(10 * IN_HAND):
            taken += 1
            yield BulkCreateUsersRequest(users=named(f"user{number}")).SerializeToString()

    async with aclosing(BulkStreams(database).run(requests(), CREATE_USERS)) as events:
        async for _ in events:
            assert taken <= answered + IN_HAND
            answered += 1


async def test_keeps_nothing_of_what_it_has_answered(database: Database) -> None:
    """Not even where each message has a key of the one before, and waits for what becomes of it."""
    kept = 0

    async def requests() -> AsyncIterator[bytes]:
        nonlocal kept
        for number in range(10 * IN_HAND):
            yield BulkCreateUsersRequest(
                users=named(f"user{number}", f"user{number + 1}")
            ).SerializeToString()
        gc.collect()
        # In a thread: this generator runs in the service's task, and the watchdog counts what that does.
        kept = await asyncio.to_thread(
            lambda: sum(isinstance(found, PendingBatch) for found in gc.get_objects())
        )

    async with aclosing(BulkStreams(database).run(requests(), CREATE_USERS)) as events:
        last = [event async for event in events][-1]

    assert (last.summary.created, last.summary.failed) == (10 * IN_HAND + 1, 10 * IN_HAND - 1)
    assert kept <= IN_HAND + 1  # the last one answered is still known to the one after it
