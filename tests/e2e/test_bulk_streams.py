"""The bulk-stream protocol: the response to each message, whatever its rows."""

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
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.bulk.message import MAX_BYTES, MAX_ROWS
from service.bulk.pending import PendingBatch
from service.bulk.stream import BulkStreams
from service.db.engine import Database
from service.server import Server
from service.users.model import User as UserRow
from service.users.servicer import CREATE_USERS
from tests.support.errors import refusal
from tests.support.load_stream import LoadStream, gap, named

# How many messages a stream reads before it answers the first of them.
MAX_PENDING = 3


@pytest.fixture
async def stream(users: UserServiceAsyncStub) -> LoadStream:
    """An open stream."""
    stream = LoadStream(users)
    await stream.send()
    await stream.answer()
    return stream


async def run_load(users: UserServiceAsyncStub, *messages: BulkCreateUsersRequest) -> list[BulkWriteResponse]:
    """Send all messages of a load, and return the events."""
    return [event async for event in users.BulkCreateUsers(iter(messages))]


async def count_users(server: Server) -> int:
    """Return how many users are stored."""
    async with server.database.read() as session:
        return await session.scalar(select(func.count()).select_from(UserRow)) or 0


async def test_first_event_has_offset_and_limits(users: UserServiceAsyncStub) -> None:
    """It says where to start, and how large a message may be."""
    opened, *_ = await run_load(users, BulkCreateUsersRequest(finish=True))

    assert opened.WhichOneof("event") == "opened"
    assert (opened.opened.next_offset, opened.opened.max_rows, opened.opened.max_bytes) == (0, 5000, 4 << 20)


async def test_options_alone_open_the_stream(users: UserServiceAsyncStub) -> None:
    """Clients may wait for the first event before they send rows."""
    stream = LoadStream(users)
    await stream.send(options=BulkOptions())

    assert (await stream.answer()).HasField("opened")


async def test_acknowledges_each_message_in_order(users: UserServiceAsyncStub) -> None:
    """The first message may have rows too; every message with rows has an ack, then comes the summary."""
    _, *acks, last = await run_load(
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


async def test_counts_each_row_once(users: UserServiceAsyncStub) -> None:
    """The summary is the sum of the acks."""
    *_, last = await run_load(
        users,
        BulkCreateUsersRequest(options=BulkOptions(on_conflict=BulkOptions.SKIP), users=named("a", "b")),
        BulkCreateUsersRequest(users=[*named("b", "c"), User(email="nobody")], finish=True),
    )

    assert last.summary == BulkSummary(next_offset=5, created=3, skipped=1, failed=1, state=BulkLoad.FINISHED)


async def test_accepts_explicit_offsets(stream: LoadStream) -> None:
    """Clients may number their rows."""
    await stream.acknowledged("a", "b", offset=0)

    assert (await stream.acknowledged("c", offset=2)).next_offset == 3


async def test_refuses_a_gap_and_stays_open(stream: LoadStream) -> None:
    """Rows ahead of the watermark are not written; the error has the offset to continue from."""
    await stream.acknowledged("a")

    ahead = await stream.acknowledged("b", offset=5)
    back = await stream.acknowledged("b", offset=1)

    assert gap(ahead) == (OUT_OF_RANGE, "OFFSET_GAP", "1")
    assert (ahead.offset, ahead.next_offset, ahead.created) == (5, 1, 0)
    assert (back.next_offset, back.created) == (2, 1)


async def test_refuses_rows_below_the_watermark(server: Server, stream: LoadStream) -> None:
    """Without a load_id no outcomes are stored, so rows sent again are neither replayed nor written."""
    await stream.acknowledged("a", "b")

    again = await stream.acknowledged("x", offset=0)
    straddling = await stream.acknowledged("y", "z", offset=1)

    assert gap(again) == gap(straddling) == (OUT_OF_RANGE, "OFFSET_GAP", "2")
    assert await count_users(server) == 2
    assert (await stream.acknowledged("c", offset=2)).next_offset == 3


async def test_messages_after_a_refused_one_are_refused(server: Server, stream: LoadStream) -> None:
    """A message without an offset follows the previous one, even a refused one."""
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
    assert await count_users(server) == 3


async def test_message_is_limited_to_5000_rows(stream: LoadStream) -> None:
    """A larger message is refused; the stream stays open at the same offset."""
    names = [f"user{number}" for number in range(MAX_ROWS + 1)]

    refused = await stream.acknowledged(*names)
    written = await stream.acknowledged(*names[1:], offset=0)

    assert (refused.error.code, refused.next_offset) == (INVALID_ARGUMENT, 0)
    assert (written.created, written.next_offset) == (MAX_ROWS, MAX_ROWS)


async def test_message_is_limited_to_4_mib(stream: LoadStream) -> None:
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


async def test_half_close_does_not_finish_the_load(users: UserServiceAsyncStub, server: Server) -> None:
    """Without `finish` the summary has no final state; acknowledged rows are stored."""
    *_, last = await run_load(users, BulkCreateUsersRequest(users=named("a")))

    assert last.summary == BulkSummary(next_offset=1, created=1, state=BulkLoad.STATE_UNSPECIFIED)
    assert await count_users(server) == 1


async def test_finish_after_a_gap_completes_nothing(server: Server, stream: LoadStream) -> None:
    """The stream stays open for the missing rows."""
    ahead = await stream.acknowledged("b", offset=1, finish=True)
    alone = await stream.acknowledged(finish=True)
    await stream.send("a", "b", offset=0, finish=True)
    written, summary = await stream.answer(), await stream.answer()

    assert gap(ahead) == gap(alone) == (OUT_OF_RANGE, "OFFSET_GAP", "0")
    assert written.ack.created == 2
    assert summary.summary == BulkSummary(next_offset=2, created=2, state=BulkLoad.FINISHED)


async def test_refuses_a_stream_without_messages(users: UserServiceAsyncStub) -> None:
    """The only response is the error."""
    refused = await refusal(run_load(users))

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_OPTIONS")


async def test_refuses_options_after_the_first_message(server: Server, stream: LoadStream) -> None:
    """The stream ends; acknowledged rows stay."""
    await stream.acknowledged("a")
    await stream.send("b", options=BulkOptions())

    refused = await refusal(stream.answer())

    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_OPTIONS")
    assert await count_users(server) == 1


async def test_too_many_failures_end_the_stream(server: Server, users: UserServiceAsyncStub) -> None:
    """A summary precedes the error; acknowledged rows stay."""
    stream = LoadStream(users)
    await stream.send("a", "a", "b", options=BulkOptions(max_failures=1))
    await stream.send("a", "c")

    _, first, second, last = [await stream.answer() for _ in range(4)]
    refused = await refusal(stream.answer())

    assert (first.ack.failed, second.ack.failed) == (1, 1)
    assert last.summary == BulkSummary(next_offset=5, created=3, failed=2)
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_FAILURES")
    assert await count_users(server) == 3


async def test_returns_ids_only_on_request(users: UserServiceAsyncStub) -> None:
    """`ids[i]` belongs to row i of the message, and is 0 if the row failed."""
    rows = [*named("c", "a"), User(email="nobody"), *named("b", "a")]
    options = BulkOptions(return_ids=True, on_conflict=BulkOptions.SKIP)

    _, with_ids, _ = await run_load(users, BulkCreateUsersRequest(options=options, users=rows))
    _, without_ids, _ = await run_load(users, BulkCreateUsersRequest(users=rows))

    ids = [(await users.GetUser(GetUserRequest(email=row.email))).id for row in rows if "@" in row.email]
    assert with_ids.ack.ids == [*ids[:2], 0, *ids[2:]]
    assert without_ids.ack.ids == []


async def test_reads_at_most_three_messages_ahead(database: Database) -> None:
    """The server does not read ahead of a client that does not read, so its memory stays bounded."""
    taken = answered = 0

    async def requests() -> AsyncIterator[bytes]:
        nonlocal taken
        for number in range(10 * MAX_PENDING):
            taken += 1
            yield BulkCreateUsersRequest(users=named(f"user{number}")).SerializeToString()

    async with aclosing(BulkStreams(database).run(requests(), CREATE_USERS)) as events:
        async for _ in events:
            assert taken <= answered + MAX_PENDING
            answered += 1


async def test_keeps_no_answered_batches(database: Database) -> None:
    """Even if each batch depends on the previous one."""
    kept = 0

    async def requests() -> AsyncIterator[bytes]:
        nonlocal kept
        for number in range(10 * MAX_PENDING):
            yield BulkCreateUsersRequest(
                users=named(f"user{number}", f"user{number + 1}")
            ).SerializeToString()
        gc.collect()
        # In a thread, because the watchdog would count the time against the service's task.
        kept = await asyncio.to_thread(
            lambda: sum(isinstance(found, PendingBatch) for found in gc.get_objects())
        )

    async with aclosing(BulkStreams(database).run(requests(), CREATE_USERS)) as events:
        last = [event async for event in events][-1]

    assert (last.summary.created, last.summary.failed) == (10 * MAX_PENDING + 1, 10 * MAX_PENDING - 1)
    assert kept <= MAX_PENDING + 1  # the next batch refers to the last one answered


async def test_idle_stream_keeps_no_message(stream: LoadStream) -> None:
    """It may be idle for minutes, and nothing may be left of one that was cut off."""
    request = BulkCreateUsersRequest(users=named("user", full_name="x" * 100_003))
    await stream.call.write(request)
    assert (await stream.answer()).ack.failed == 1

    # In a thread, because the watchdog would count the time against the service's task.
    assert await asyncio.to_thread(keepers_of_bytes, request.ByteSize()) == []


def keepers_of_bytes(size: int) -> list[str]:
    """Return the types of the objects that refer to bytes of a size."""
    return [
        type(keeper).__qualname__
        for keeper in gc.get_objects()
        for kept in gc.get_referents(keeper)
        if isinstance(kept, bytes) and len(kept) == size
    ]
