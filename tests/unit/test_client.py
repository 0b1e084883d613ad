"""BulkLoader against a server with scripted faults."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import example, given, settings, strategies as st

from roster.client import BulkLoader, Event, LoadInterrupted, channel
from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkOptions, BulkSummary, BulkWriteResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub

BATCH = 10
WINDOW = 4


def status(reason: str, *, retry: bool = False) -> Status:
    """Return a status as the server sends it."""
    details: list[Message] = [ErrorInfo(reason=reason, domain="roster"), *([RetryInfo()] if retry else [])]
    packed = [AnyMessage() for _ in details]
    for each, detail in zip(packed, details, strict=True):
        each.Pack(detail)
    return Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message=f"it was {reason}", details=packed)


BUSY = status("DATABASE_UNAVAILABLE", retry=True)
FENCED = status("LOAD_FENCED")
UNKNOWN = status("OUTCOME_UNKNOWN")
# The stream breaks without a reason, before a message is written, or between the write and its ack.
CUT = Status(code=1)
CUT_AFTER_WRITE = Status(code=2)
NAMED = {"options": BulkOptions(load_id="staff")}


class ScriptedServer:
    """Follows the contract, except for the messages that `faults` lists by number, from 0."""

    def __init__(
        self, faults: dict[int, Status] | None = None, max_rows: int = 5000, max_bytes: int = 4 << 20
    ) -> None:
        self.faults = faults or {}
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.sizes: list[int] = []
        self.emails: list[str] = []
        self.opened = 0
        self.is_silent = False
        self.ends_with: Status | None = None
        self.finish_fault: Status | None = None
        self.ended = asyncio.Event()
        self.is_finished = False
        self.got_rows = asyncio.Event()

    async def answer(
        self, requests: AsyncIterator[BulkCreateUsersRequest], context: Any
    ) -> AsyncGenerator[BulkWriteResponse, None]:
        """Serve one stream."""
        is_named = False
        try:
            async for request in requests:
                if request.HasField("options"):
                    is_named = bool(request.options.load_id)
                    self.opened += 1
                    opened = BulkOpened(max_rows=self.max_rows, max_bytes=self.max_bytes)
                    opened.next_offset = len(self.emails)
                    yield BulkWriteResponse(opened=opened)
                    continue
                if request.finish and self.finish_fault:
                    fault, self.finish_fault = self.finish_fault, None
                    yield self.refusal(request.offset, fault)
                elif request.finish and request.offset == len(self.emails):
                    self.is_finished = True
                    summary = BulkSummary(next_offset=len(self.emails), state=BulkLoad.FINISHED)
                    yield BulkWriteResponse(summary=summary)
                    if not self.ends_with:
                        return
                    await abort(context, self.ends_with)
                elif response := await self.answer_batch(request, context, is_named=is_named):
                    yield response
        finally:
            self.ended.set()

    async def answer_batch(
        self, request: BulkCreateUsersRequest, context: Any, *, is_named: bool
    ) -> BulkWriteResponse | None:
        """Return the answer to a message of rows."""
        fault = self.faults.get(len(self.sizes))
        self.sizes.append(request.ByteSize())
        self.got_rows.set()
        if self.is_silent:
            return None
        if fault in (CUT, UNKNOWN, FENCED):
            await abort(context, fault)
        is_replay = is_named and request.offset < len(self.emails)
        if fault in (None, CUT_AFTER_WRITE) and request.offset != len(self.emails) and not is_replay:
            fault = status("OFFSET_GAP")
        if fault not in (None, CUT_AFTER_WRITE):
            return self.refusal(request.offset, fault)
        emails = [user.email for user in request.users]
        end = request.offset + len(emails)
        if is_replay:
            assert self.emails[request.offset : end] == emails
        else:
            self.emails += emails
        if fault == CUT_AFTER_WRITE:
            await abort(context, fault)
        ack = BulkAck(offset=request.offset, next_offset=len(self.emails), created=len(emails))
        ack.replayed = is_replay
        return BulkWriteResponse(ack=ack)

    def refusal(self, offset: int, fault: Status) -> BulkWriteResponse:
        """Return the ack of a message that was not written."""
        return BulkWriteResponse(ack=BulkAck(offset=offset, next_offset=len(self.emails), error=fault))


async def abort(context: Any, fault: Status) -> None:
    """End a stream with the reason of a fault, or like a server that disappears."""
    trailer = (("grpc-status-details-bin", fault.SerializeToString()),) if fault.details else ()
    await context.abort(grpc.StatusCode.UNAVAILABLE, fault.message or "the server is gone", trailer)


@asynccontextmanager
async def loading(scripted: ScriptedServer, **options: Any) -> AsyncIterator[BulkLoader[Any]]:
    """Yield a loader connected to a scripted server."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        scripted.answer,
        request_deserializer=BulkCreateUsersRequest.FromString,
        response_serializer=BulkWriteResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("roster.v1.UserService", {"BulkCreateUsers": handler})]
    )
    with TemporaryDirectory() as folder:
        # Not a port, which an earlier server may have had: channels share connections, and calls fail at once
        # while the one to that server is refused.
        address = f"unix:{folder}/server"
        server.add_insecure_port(address)
        await server.start()
        async with channel(address) as connection:
            method = UserServiceStub(connection).BulkCreateUsers
            defaults = {
                "options": BulkOptions(),
                "batch_rows": BATCH,
                "window": WINDOW,
                "first_pause_seconds": 0,
            }
            yield BulkLoader(method, BulkCreateUsersRequest, **{**defaults, **options})
        await server.stop(None)


def users(count: int) -> list[User]:
    """Return this many users."""
    return [User(email=f"{number}@example.org") for number in range(count)]


def emails(count: int) -> list[str]:
    """Return the e-mails of this many users."""
    return [user.email for user in users(count)]


async def each(rows: Iterable[Message]) -> AsyncIterator[Message]:
    """Yield the rows."""
    for row in rows:
        yield row


async def events_of(loader: BulkLoader[Any], rows: AsyncIterator[Message] | Iterable[Message]) -> list[Event]:
    """Return all events of a load."""
    source = rows if isinstance(rows, AsyncIterator) else each(rows)
    async with aclosing(loader.run(source)) as events:
        return [event async for event in events]


async def test_yields_opened_then_acks_in_order_then_the_summary() -> None:
    """A consumer can follow the progress of the load to its end."""
    async with loading(ScriptedServer()) as loader:
        first, *acks, last = await events_of(loader, users(25))

    assert isinstance(first, BulkOpened)
    assert [ack.next_offset for ack in acks] == [10, 20, 25]
    assert isinstance(last, BulkSummary)


async def test_takes_rows_from_an_async_iterator() -> None:
    """The source may wait for its rows."""

    async def source() -> AsyncIterator[User]:
        for user in users(25):
            await asyncio.sleep(0)
            yield user

    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        assert len(await events_of(loader, source())) == 5

    assert scripted.emails == emails(25)


async def test_finishes_a_load_without_rows() -> None:
    """A source without rows completes the load."""
    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        assert len(await events_of(loader, [])) == 2

    assert scripted.is_finished


async def test_buffers_at_most_the_window_and_one_message() -> None:
    """The source is read only as fast as acks arrive."""
    pulled = 0

    def source() -> Iterator[User]:
        nonlocal pulled
        for user in users(50 * BATCH):
            pulled += 1
            yield user

    acknowledged = 0
    async with loading(ScriptedServer()) as loader, aclosing(loader.run(each(source()))) as events:
        async for event in events:
            assert pulled <= acknowledged + (WINDOW + 1) * BATCH
            if isinstance(event, BulkAck):
                acknowledged = event.next_offset

    assert acknowledged == 50 * BATCH


async def test_sends_at_most_the_window_before_an_ack() -> None:
    """A silent server gets four messages; the fifth is filled but not sent."""
    pulled = 0
    ready = asyncio.Event()

    def source() -> Iterator[User]:
        nonlocal pulled
        for user in users(50 * BATCH):
            pulled += 1
            if pulled == (WINDOW + 1) * BATCH:
                ready.set()
            yield user

    scripted = ScriptedServer()
    scripted.is_silent = True
    async with loading(scripted) as loader:
        task = asyncio.create_task(events_of(loader, source()))
        await ready.wait()
        while len(scripted.sizes) < WINDOW:
            scripted.got_rows.clear()
            await scripted.got_rows.wait()
        task.cancel()
        await scripted.ended.wait()

    assert (len(scripted.sizes), pulled) == (WINDOW, (WINDOW + 1) * BATCH)


async def test_limits_messages_to_what_the_server_allows() -> None:
    """No message exceeds the rows or bytes in `opened`."""
    scripted = ScriptedServer(max_rows=7, max_bytes=1000)
    rows = [User(email=f"{number}@example.org", full_name="x" * (number * 13 % 300)) for number in range(99)]
    async with loading(scripted) as loader:
        _, *acks, _ = await events_of(loader, rows)

    assert scripted.emails == emails(99)
    assert max(scripted.sizes) <= 1000
    assert max(ack.created for ack in acks if isinstance(ack, BulkAck)) == 7


@pytest.mark.parametrize(
    ("faults", "count"),
    [
        pytest.param({0: BUSY}, 95, id="the first message"),
        pytest.param({1: BUSY}, 95, id="a message in the middle"),
        pytest.param({1: BUSY, 5: BUSY, 6: BUSY}, 95, id="the same message repeatedly"),
        pytest.param({9: BUSY}, 95, id="the last message"),
        pytest.param({2: BUSY, 3: BUSY}, 25, id="the message before the last"),
    ],
)
async def test_resends_refused_messages_on_the_same_stream(faults: dict[int, Status], count: int) -> None:
    """Each row arrives once and in order, and the consumer sees no fault."""
    scripted = ScriptedServer(faults)
    async with loading(scripted) as loader:
        _, *acks, _ = await events_of(loader, users(count))

    assert scripted.emails == emails(count)
    assert sum(ack.created for ack in acks if isinstance(ack, BulkAck)) == count


async def test_resends_a_refused_finish() -> None:
    """The last message, which has no rows, is retried too."""
    scripted = ScriptedServer()
    scripted.finish_fault = BUSY
    async with loading(scripted) as loader:
        await events_of(loader, users(25))

    assert scripted.is_finished


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.integers(0, 40), st.sampled_from([BUSY, CUT, CUT_AFTER_WRITE, UNKNOWN])),
    st.integers(1, 6),
)
@example({8: CUT_AFTER_WRITE, 9: BUSY}, 3)
async def test_each_row_arrives_once_whatever_fails(faults: dict[int, Status], window: int) -> None:
    """Each row is also acknowledged once, whatever the order of faults, acks and stale answers."""
    scripted = ScriptedServer(faults)
    async with loading(scripted, window=window, max_retries=50, **NAMED) as loader:
        events = await events_of(loader, users(95))

    acks = [event for event in events if isinstance(event, BulkAck)]
    assert scripted.emails == emails(95)
    assert [ack.offset for ack in acks] == list(range(0, 95, BATCH))
    assert sum(ack.created for ack in acks) == 95


async def test_reopens_a_named_load_after_its_stream_breaks() -> None:
    """The consumer sees a second `opened`, and the lost ack as a replay."""
    scripted = ScriptedServer({3: CUT_AFTER_WRITE})
    async with loading(scripted, **NAMED) as loader:
        events = await events_of(loader, users(95))

    opened = [event.next_offset for event in events if isinstance(event, BulkOpened)]
    assert opened == [0, 40]
    assert [event.offset for event in events if isinstance(event, BulkAck) and event.replayed] == [30]
    assert scripted.emails == emails(95)


async def test_resumes_the_load_of_another_loader() -> None:
    """Settled rows are skipped; the source yields them again."""
    scripted = ScriptedServer({3: FENCED})
    async with loading(scripted, **NAMED) as first:
        with pytest.raises(LoadInterrupted, match="LOAD_FENCED"):
            await events_of(first, users(95))
    async with loading(scripted, **NAMED) as second:
        opened, *acks, _ = await events_of(second, users(95))

    assert isinstance(opened, BulkOpened)
    assert opened.next_offset == 30
    assert [ack.offset for ack in acks if isinstance(ack, BulkAck)] == [*range(30, 95, BATCH)]
    assert scripted.emails == emails(95)


async def test_resends_settled_rows_for_their_ids() -> None:
    """With `return_ids` each row has its ack, even if another loader sent it."""
    scripted = ScriptedServer()
    scripted.emails = emails(30)
    async with loading(scripted, options=BulkOptions(load_id="staff", return_ids=True)) as loader:
        _, *acks, _ = await events_of(loader, users(95))

    assert [(ack.offset, ack.replayed) for ack in acks if isinstance(ack, BulkAck)] == [
        (offset, offset < 30) for offset in range(0, 95, BATCH)
    ]


async def test_refuses_to_finish_a_load_with_fewer_rows_than_it_has() -> None:
    """They can't be the rows that the load began with."""
    scripted = ScriptedServer()
    scripted.emails = emails(30)
    async with loading(scripted, **NAMED) as loader:
        with pytest.raises(LoadInterrupted, match="the source has only 29 rows, but the load already has 30"):
            await events_of(loader, users(29))

    assert not scripted.is_finished


@pytest.mark.parametrize(
    ("fault", "streams"), [(CUT, 4), (UNKNOWN, 4), (FENCED, 1), (status("LOAD_ABORTED"), 1)]
)
async def test_reopens_a_load_only_if_that_can_help(fault: Status, streams: int) -> None:
    """A server that is away is retried up to the limit; a definite refusal is not."""
    scripted = ScriptedServer(dict.fromkeys(range(2, 99), fault))
    async with loading(scripted, max_retries=3, window=1, **NAMED) as loader:
        with pytest.raises(LoadInterrupted) as caught:
            await events_of(loader, users(95))

    assert caught.value.acknowledged == 20
    assert scripted.opened == streams


async def test_ignores_a_stream_that_breaks_after_the_summary() -> None:
    """The load is complete."""
    scripted = ScriptedServer()
    scripted.ends_with = CUT
    async with loading(scripted, **NAMED) as loader:
        assert isinstance((await events_of(loader, users(25)))[-1], BulkSummary)

    assert scripted.opened == 1


async def test_raises_a_reason_that_follows_the_summary() -> None:
    """A load with too many failures has a summary, but is not complete."""
    scripted = ScriptedServer()
    scripted.ends_with = status("TOO_MANY_FAILURES")
    async with loading(scripted, **NAMED) as loader:
        with pytest.raises(LoadInterrupted, match="TOO_MANY_FAILURES"):
            await events_of(loader, users(25))


async def test_raises_an_error_of_the_source_between_streams() -> None:
    """There is no call to cancel while the server is away."""
    is_away = asyncio.Event()

    async def source() -> AsyncIterator[User]:
        for user in users(WINDOW * BATCH):
            yield user
        await is_away.wait()
        raise ZeroDivisionError

    scripted = ScriptedServer({0: CUT})
    async with loading(scripted, **NAMED) as loader:
        task = asyncio.create_task(events_of(loader, source()))
        await scripted.ended.wait()
        is_away.set()
        with pytest.raises(ZeroDivisionError):
            await task


@pytest.mark.parametrize(("fault", "messages"), [(BUSY, 4), (FENCED, 1)])
async def test_gives_up_if_retrying_does_not_help(fault: Status, messages: int) -> None:
    """A retryable fault is retried up to the limit, any other not at all."""
    scripted = ScriptedServer(dict.fromkeys(range(2, 99), fault))
    async with loading(scripted, max_retries=3, window=1) as loader:
        with pytest.raises(LoadInterrupted) as caught:
            await events_of(loader, users(95))

    assert caught.value.acknowledged == 20
    assert caught.value.reason in {"DATABASE_UNAVAILABLE", "LOAD_FENCED"}
    assert len(scripted.sizes) == 2 + messages


async def test_reports_acknowledged_rows_when_the_stream_breaks() -> None:
    """The caller knows where to continue."""
    scripted = ScriptedServer({3: CUT})
    async with loading(scripted) as loader:
        with pytest.raises(
            LoadInterrupted, match=r"the server is gone \(30 rows were acknowledged\)"
        ) as caught:
            await events_of(loader, users(95))

    assert (caught.value.reason, caught.value.acknowledged) == ("DISCONNECTED", 30)


async def test_keeps_the_status_of_the_server_if_a_write_fails_too() -> None:
    """grpc.aio replaces it by INTERNAL if both happen at once, as in every second load here."""
    rows = [User(email=email, full_name="x" * 2000) for email in emails(950)]
    messages = set()
    for _ in range(20):
        scripted = ScriptedServer({3: CUT})
        async with loading(scripted) as loader:
            with pytest.raises(LoadInterrupted) as caught:
                await events_of(loader, rows)
        messages.add(caught.value.message)

    assert messages == {"the server is gone"}


async def test_reports_that_no_server_answers() -> None:
    """The load is interrupted, with no rows acknowledged."""
    async with channel("unix:/nowhere/roster.sock") as connection:
        loader = BulkLoader(
            UserServiceStub(connection).BulkCreateUsers, BulkCreateUsersRequest, BulkOptions()
        )
        with pytest.raises(LoadInterrupted) as caught:
            await events_of(loader, users(5))

    assert (caught.value.reason, caught.value.acknowledged) == ("DISCONNECTED", 0)


async def test_raises_errors_of_the_source() -> None:
    """An error cancels the call, and does not complete the load."""

    def source() -> Iterator[User]:
        yield from users(25)
        raise ZeroDivisionError

    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        with pytest.raises(ZeroDivisionError):
            await events_of(loader, source())
        await scripted.ended.wait()

    assert not scripted.is_finished


async def test_ends_if_the_source_is_cancelled() -> None:
    """A cancellation inside the source ends the load like an error does."""

    async def source() -> AsyncIterator[User]:
        yield users(1)[0]
        raise asyncio.CancelledError

    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        with pytest.raises(asyncio.CancelledError):
            await events_of(loader, source())
        await scripted.ended.wait()

    assert not scripted.is_finished


@pytest.mark.parametrize("leave", ["cancel", "close"])
async def test_ends_the_call_when_the_caller_leaves(leave: str) -> None:
    """A caller that is cancelled or closes the iterator leaves no open call."""
    scripted = ScriptedServer()
    scripted.is_silent = True
    async with loading(scripted) as loader:
        events = loader.run(each(users(95)))
        await anext(events)
        if leave == "close":
            await events.aclose()
        else:
            await cancel(anext(events), scripted.got_rows)
        await scripted.ended.wait()

    assert not scripted.is_finished


async def cancel(work: Any, when: asyncio.Event) -> None:
    """Cancel work at an event, and wait until it has ended."""
    task = asyncio.ensure_future(work)
    await when.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
