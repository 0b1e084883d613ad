"""BulkLoader against a server whose faults are scripted."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import example, given, settings, strategies as st

from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkOptions, BulkSummary, BulkWriteResponse
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.client import BulkLoader, Event, LoadInterrupted, channel

BATCH = 10
WINDOW = 4


def status(reason: str, *, retry: bool = False) -> Status:
    """Return an error as the server sends it."""
    details: list[Message] = [ErrorInfo(reason=reason, domain="roster"), *([RetryInfo()] if retry else [])]
    packed = [AnyMessage() for _ in details]
    for each, detail in zip(packed, details, strict=True):
        each.Pack(detail)
    return Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message=f"it was {reason}", details=packed)


BUSY = status("DATABASE_UNAVAILABLE", retry=True)
FENCED = status("LOAD_FENCED")
UNKNOWN = status("OUTCOME_UNKNOWN")
# The stream ends, without a reason: before a message is taken, and when it is, but for its ack.
CUT = Status(code=1)
CUT_BEHIND = Status(code=2)
NAMED = {"options": BulkOptions(load_id="staff")}


class ScriptedServer:
    """Takes rows as the contract says, but for the faults of the messages that `faults` numbers from 0."""

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
        """Run one stream."""
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
                    yield self.refused(request.offset, fault)
                elif request.finish and request.offset == len(self.emails):
                    self.is_finished = True
                    summary = BulkSummary(next_offset=len(self.emails), state=BulkLoad.FINISHED)
                    yield BulkWriteResponse(summary=summary)
                    if not self.ends_with:
                        return
                    await aborted(context, self.ends_with)
                elif response := await self.take(request, context, is_named=is_named):
                    yield response
        finally:
            self.ended.set()

    async def take(
        self, request: BulkCreateUsersRequest, context: Any, *, is_named: bool
    ) -> BulkWriteResponse | None:
        """Return the answer to a message."""
        fault = self.faults.get(len(self.sizes))
        self.sizes.append(request.ByteSize())
        self.got_rows.set()
        if self.is_silent:
            return None
        if fault in (CUT, UNKNOWN, FENCED):
            await aborted(context, fault)
        is_replay = is_named and request.offset < len(self.emails)
        if fault in (None, CUT_BEHIND) and request.offset != len(self.emails) and not is_replay:
            fault = status("OFFSET_GAP")
        if fault not in (None, CUT_BEHIND):
            return self.refused(request.offset, fault)
        emails = [user.email for user in request.users]
        end = request.offset + len(emails)
        if is_replay:
            assert self.emails[request.offset : end] == emails
        else:
            self.emails += emails
        if fault == CUT_BEHIND:
            await aborted(context, fault)
        ack = BulkAck(offset=request.offset, next_offset=len(self.emails), created=len(emails))
        ack.replayed = is_replay
        return BulkWriteResponse(ack=ack)

    def refused(self, offset: int, fault: Status) -> BulkWriteResponse:
        """Return the answer to a message of which nothing was written."""
        return BulkWriteResponse(ack=BulkAck(offset=offset, next_offset=len(self.emails), error=fault))


async def aborted(context: Any, fault: Status) -> None:
    """End a stream, as a server does that has a reason or as one that goes away."""
    trailer = (("grpc-status-details-bin", fault.SerializeToString()),) if fault.details else ()
    await context.abort(grpc.StatusCode.UNAVAILABLE, fault.message or "the server is gone", trailer)


@asynccontextmanager
async def loading(scripted: ScriptedServer, **options: Any) -> AsyncIterator[BulkLoader[Any]]:
    """Yield a loader that is connected to a server which follows the script."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        scripted.answer,
        request_deserializer=BulkCreateUsersRequest.FromString,
        response_serializer=BulkWriteResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("roster.v1.UserService", {"BulkCreateUsers": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with channel(f"127.0.0.1:{port}") as connection:
        method = UserServiceStub(connection).BulkCreateUsers
        defaults = {"options": BulkOptions(), "batch_rows": BATCH, "window": WINDOW, "first_pause_seconds": 0}
        yield BulkLoader(method, BulkCreateUsersRequest, **{**defaults, **options})
    await server.stop(None)


def users(count: int) -> list[User]:
    """Return so many users."""
    return [User(email=f"{number}@example.org") for number in range(count)]


def emails(count: int) -> list[str]:
    """Return their e-mails."""
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
    """A consumer sees how far the load is, and its end."""
    async with loading(ScriptedServer()) as loader:
        first, *acks, last = await events_of(loader, users(25))

    assert isinstance(first, BulkOpened)
    assert [ack.next_offset for ack in acks] == [10, 20, 25]
    assert isinstance(last, BulkSummary)


async def test_takes_rows_from_an_async_iterator() -> None:
    """A source that waits for its rows is one too."""

    async def source() -> AsyncIterator[User]:
        for user in users(25):
            await asyncio.sleep(0)
            yield user

    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        assert len(await events_of(loader, source())) == 5

    assert scripted.emails == emails(25)


async def test_finishes_a_load_without_rows() -> None:
    """Nothing to send is a load that is complete."""
    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        assert len(await events_of(loader, [])) == 2

    assert scripted.is_finished


async def test_keeps_no_more_rows_than_the_window_and_one_message() -> None:
    """However long the source is, it is read only as far as acks let it."""
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


async def test_sends_no_more_messages_than_the_window_before_an_ack() -> None:
    """A server that answers nothing gets four messages, and the fifth is only kept ready."""
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


async def test_cuts_messages_by_what_the_server_allows() -> None:
    """Neither rows nor bytes of a message exceed what `opened` says."""
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
        pytest.param({0: BUSY}, 95, id="the first message can't be written"),
        pytest.param({1: BUSY}, 95, id="one in the middle"),
        pytest.param({1: BUSY, 5: BUSY, 6: BUSY}, 95, id="the same again and again"),
        pytest.param({9: BUSY}, 95, id="the last"),
        pytest.param({2: BUSY, 3: BUSY}, 25, id="so that the last message is sent behind it"),
    ],
)
async def test_goes_back_to_what_was_not_written(faults: dict[int, Status], count: int) -> None:
    """Every row arrives once and in order, in the same stream, and the consumer sees no fault."""
    scripted = ScriptedServer(faults)
    async with loading(scripted) as loader:
        _, *acks, _ = await events_of(loader, users(count))

    assert scripted.emails == emails(count)
    assert sum(ack.created for ack in acks if isinstance(ack, BulkAck)) == count


async def test_finishes_again_what_could_not_be_finished() -> None:
    """A fault that passes may meet the last message too, which has no rows."""
    scripted = ScriptedServer()
    scripted.finish_fault = BUSY
    async with loading(scripted) as loader:
        await events_of(loader, users(25))

    assert scripted.is_finished


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.integers(0, 40), st.sampled_from([BUSY, CUT, CUT_BEHIND, UNKNOWN])), st.integers(1, 6)
)
@example({8: CUT_BEHIND, 9: BUSY}, 3)
async def test_every_row_arrives_once_whatever_fails(faults: dict[int, Status], window: int) -> None:
    """The order of faults, acks and stale messages does not matter; each row is acknowledged once."""
    scripted = ScriptedServer(faults)
    async with loading(scripted, window=window, tries=50, **NAMED) as loader:
        events = await events_of(loader, users(95))

    acks = [event for event in events if isinstance(event, BulkAck)]
    assert scripted.emails == emails(95)
    assert [ack.offset for ack in acks] == list(range(0, 95, BATCH))
    assert sum(ack.created for ack in acks) == 95


async def test_a_load_with_a_name_survives_its_stream() -> None:
    """It is opened again, and the consumer sees that; the ack that was lost comes as a replay."""
    scripted = ScriptedServer({3: CUT_BEHIND})
    async with loading(scripted, **NAMED) as loader:
        events = await events_of(loader, users(95))

    opened = [event.next_offset for event in events if isinstance(event, BulkOpened)]
    assert opened == [0, 40]
    assert [event.offset for event in events if isinstance(event, BulkAck) and event.replayed] == [30]
    assert scripted.emails == emails(95)


async def test_goes_on_with_what_another_loader_began() -> None:
    """Rows that are settled are skipped; the source has to bring them all the same."""
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


async def test_sends_settled_rows_again_for_their_ids() -> None:
    """With `return_ids` each row has its ack, also where another loader sent it."""
    scripted = ScriptedServer()
    scripted.emails = emails(30)
    async with loading(scripted, options=BulkOptions(load_id="staff", return_ids=True)) as loader:
        _, *acks, _ = await events_of(loader, users(95))

    assert [(ack.offset, ack.replayed) for ack in acks if isinstance(ack, BulkAck)] == [
        (offset, offset < 30) for offset in range(0, 95, BATCH)
    ]


async def test_refuses_to_finish_a_load_with_fewer_rows_than_it_has() -> None:
    """They are not the rows that it began with."""
    scripted = ScriptedServer()
    scripted.emails = emails(30)
    async with loading(scripted, **NAMED) as loader:
        with pytest.raises(LoadInterrupted, match="has 30 rows already, and here are only 29"):
            await events_of(loader, users(29))

    assert not scripted.is_finished


@pytest.mark.parametrize(
    ("fault", "streams"), [(CUT, 4), (UNKNOWN, 4), (FENCED, 1), (status("LOAD_ABORTED"), 1)]
)
async def test_opens_a_load_again_only_where_that_helps(fault: Status, streams: int) -> None:
    """A server that stays away is tried so many times, one that has a reason to refuse once."""
    scripted = ScriptedServer(dict.fromkeys(range(2, 99), fault))
    async with loading(scripted, tries=3, window=1, **NAMED) as loader:
        with pytest.raises(LoadInterrupted) as caught:
            await events_of(loader, users(95))

    assert caught.value.acknowledged == 20
    assert scripted.opened == streams


async def test_a_stream_that_breaks_behind_the_summary_is_no_matter() -> None:
    """Everything is told by then."""
    scripted = ScriptedServer()
    scripted.ends_with = CUT
    async with loading(scripted, **NAMED) as loader:
        assert isinstance((await events_of(loader, users(25)))[-1], BulkSummary)

    assert scripted.opened == 1


async def test_a_reason_behind_the_summary_is_raised() -> None:
    """The summary of a load with too many failures is not its end."""
    scripted = ScriptedServer()
    scripted.ends_with = status("TOO_MANY_FAILURES")
    async with loading(scripted, **NAMED) as loader:
        with pytest.raises(LoadInterrupted, match="TOO_MANY_FAILURES"):
            await events_of(loader, users(25))


async def test_an_error_of_the_source_is_raised_though_the_server_is_away() -> None:
    """It may come while there is no stream that it could end."""
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
async def test_gives_up_where_trying_does_not_help(fault: Status, messages: int) -> None:
    """A fault that passes is tried so many times, one that doesn't once."""
    scripted = ScriptedServer(dict.fromkeys(range(2, 99), fault))
    async with loading(scripted, tries=3, window=1) as loader:
        with pytest.raises(LoadInterrupted) as caught:
            await events_of(loader, users(95))

    assert caught.value.acknowledged == 20
    assert caught.value.reason in {"DATABASE_UNAVAILABLE", "LOAD_FENCED"}
    assert len(scripted.sizes) == 2 + messages


async def test_says_how_many_rows_were_acknowledged_when_the_stream_dies() -> None:
    """The caller knows where to go on."""
    scripted = ScriptedServer({3: CUT})
    async with loading(scripted) as loader:
        with pytest.raises(
            LoadInterrupted, match=r"the server is gone \(30 rows were acknowledged\)"
        ) as caught:
            await events_of(loader, users(95))

    assert (caught.value.reason, caught.value.acknowledged) == ("DISCONNECTED", 30)


async def test_tells_the_status_of_the_server_though_a_write_fails_with_it() -> None:
    """grpc.aio puts INTERNAL in its place where both happen at once, as they do in every second load here."""
    rows = [User(email=email, full_name="x" * 2000) for email in emails(950)]
    told = set()
    for _ in range(20):
        scripted = ScriptedServer({3: CUT})
        async with loading(scripted) as loader:
            with pytest.raises(LoadInterrupted) as caught:
                await events_of(loader, rows)
        told.add(caught.value.message)

    assert told == {"the server is gone"}


async def test_says_that_no_server_is_there() -> None:
    """An address where nobody listens is an interrupted load, with nothing acknowledged."""
    async with channel("unix:/nowhere/roster.sock") as connection:
        loader = BulkLoader(
            UserServiceStub(connection).BulkCreateUsers, BulkCreateUsersRequest, BulkOptions()
        )
        with pytest.raises(LoadInterrupted) as caught:
            await events_of(loader, users(5))

    assert (caught.value.reason, caught.value.acknowledged) == ("DISCONNECTED", 0)


async def test_raises_what_the_source_raises() -> None:
    """An error in the source cancels the call; rows that were sent don't complete the load."""

    def source() -> Iterator[User]:
        yield from users(25)
        raise ZeroDivisionError

    scripted = ScriptedServer()
    async with loading(scripted) as loader:
        with pytest.raises(ZeroDivisionError):
            await events_of(loader, source())
        await scripted.ended.wait()

    assert not scripted.is_finished


async def test_a_source_that_is_cancelled_hangs_nothing() -> None:
    """A cancellation inside the source ends the load like an error."""

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
    """A caller who is cancelled, or closes the iterator, leaves no call behind."""
    scripted = ScriptedServer()
    scripted.is_silent = True
    async with loading(scripted) as loader:
        events = loader.run(each(users(95)))
        await anext(events)
        if leave == "close":
            await events.aclose()
        else:
            await cancelled(anext(events), scripted.got_rows)
        await scripted.ended.wait()

    assert not scripted.is_finished


async def cancelled(work: Any, when: asyncio.Event) -> None:
    """Cancel work at an event, and wait for its end."""
    task = asyncio.ensure_future(work)
    await when.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
