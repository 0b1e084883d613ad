"""What an internal service imports: a channel with sane options, and the bulk loader."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from roster.v1.bulk_pb2 import BulkAck, BulkOpened, BulkOptions, BulkSummary, BulkWriteResponse
from service.outbox import Outbox

log = logging.getLogger(__name__)

OPTIONS = [
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.max_receive_message_length", 8 << 20),
    # The server allows a ping every 20 s, also between calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise the environment's http_proxy gets even the calls to this machine.
    ("grpc.enable_http_proxy", 0),
]
BATCH_ROWS = 5000
BATCH_BYTES = 4 << 20
WINDOW = 4
TRIES = 8
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0
INTERNAL = grpc.StatusCode.INTERNAL.value[0]

Request = TypeVar("Request", bound=Message)
Event = BulkOpened | BulkAck | BulkSummary


def channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Return a channel to `host:port` or `unix:/path`; messages up to 8 MiB, keepalive every 30 s."""
    if credentials:
        return grpc.aio.secure_channel(address, credentials, OPTIONS)
    return grpc.aio.insecure_channel(address, OPTIONS)


class LoadInterrupted(Exception):
    """A bulk stream ended before all rows were in; the first `acknowledged` of them are settled for good.

    `reason` is the server's, "" where the server gave none.
    """

    def __init__(self, status: Status, acknowledged: int) -> None:
        super().__init__(f"{status.message} ({acknowledged:,} rows were acknowledged)")
        self.message: str = status.message
        self.code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        self.reason = _reason(status)
        self.acknowledged = acknowledged


class BulkLoader(Generic[Request]):
    """Sends rows through one stream of a bulk RPC and hands on what the server answers.

    `request` is the message type of `method`. A message has at most `batch_rows` rows, and no more rows and
    bytes than the server allows; at most `window` of them wait for their acks. Only the rows of these and of
    the next one are kept. Rows that were not written for a fault that passes are sent again, `tries` times
    with growing pauses. A loader makes one load.
    """

    def __init__(
        self,
        method: "grpc.aio.StreamStreamMultiCallable[Request, BulkWriteResponse]",
        request: type[Request],
        options: BulkOptions,
        *,
        batch_rows: int = BATCH_ROWS,
        window: int = WINDOW,
        tries: int = TRIES,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._method = method
        self._request = request
        self._rows_field = next(field.name for field in request.DESCRIPTOR.fields if field.is_repeated)
        self._options = options
        self._window = window
        self._tries = tries
        self._first_pause_seconds = first_pause_seconds

        self._outbox = Outbox(batch_rows, BATCH_BYTES)
        self._in_flight: deque[int] = deque()  # offsets of the messages that wait for their acks
        self._stale: list[int] = []  # of those that were sent behind one that was not written
        self._failed_tries = 0
        self._pause_seconds = 0.0
        self._is_open = self._is_complete = self._is_finish_sent = self._is_summarised = False
        self._changed = asyncio.Event()

    async def run(self, rows: AsyncIterable[Message] | Iterable[Message]) -> AsyncGenerator[Event, None]:
        """Yield `opened`, an ack for each message that was written, in order, and the summary.

        Close it (`contextlib.aclosing`) where it is left early: that cancels the call. Raises LoadInterrupted
        where the stream dies or the server refuses it, and whatever `rows` raises.
        """
        call = self._method()
        first_told: list[Status] = []
        call.add_done_callback(lambda ended: first_told.append(_status_now(ended)))
        tasks = [asyncio.create_task(self._fill(rows)), asyncio.create_task(self._send(call))]
        for task in tasks:
            task.add_done_callback(lambda done: (done.cancelled() or done.exception()) and call.cancel())
        try:
            async for response in call:
                if event := self._event(response):
                    yield event
            if not self._is_summarised:
                raise self._interrupted(_unknown("the server ended the stream without a summary"))
        except grpc.aio.AioRpcError:
            # A write that fails as the call ends puts INTERNAL in the place of its status (grpc#36066).
            status = next((told for told in first_told if told.code != INTERNAL), _status_now(call))
            raise self._interrupted(status) from None
        except asyncio.CancelledError:
            # An error in one of the tasks has cancelled the call; it is the one to raise.
            for failure in filter(None, map(_error_of, tasks)):
                raise failure from None
            raise
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self, rows: AsyncIterable[Message] | Iterable[Message]) -> None:
        await self._until(lambda: self._is_open)
        async for row in _each(rows):
            self._outbox.add(row)
            if self._outbox.is_full():
                self._changed.set()
                await self._until(lambda: not self._outbox.is_full())
        self._is_complete = True
        self._changed.set()

    async def _send(self, call: "grpc.aio.StreamStreamCall[Request, BulkWriteResponse]") -> None:
        # A call that has ended refuses to write; the side that reads knows why.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._request(options=self._options))
            while True:
                await self._until(self._has_next)
                if self._is_summarised:
                    await call.done_writing()
                    return
                if self._pause_seconds:
                    await self._pause()
                else:
                    await call.write(self._next())

    def _has_next(self) -> bool:
        if self._is_summarised:
            return True
        if not self._is_open or len(self._in_flight) + len(self._stale) >= self._window:
            return False
        if not self._is_complete:
            return self._outbox.is_full()
        return self._outbox.has_unsent() or (self._outbox.is_empty() and not self._is_finish_sent)

    def _next(self) -> Request:
        offset = self._outbox.position
        rows = self._outbox.take()
        self._changed.set()
        if not rows:
            self._is_finish_sent = True
            return self._request(offset=offset, finish=True)
        self._in_flight.append(offset)
        return self._request(offset=offset, **{self._rows_field: rows})

    def _event(self, response: BulkWriteResponse) -> Event | None:
        self._changed.set()
        match response.WhichOneof("event"):
            case "opened":
                self._is_open = True
                self._outbox.limit(response.opened.max_rows, response.opened.max_bytes)
                return response.opened
            case "summary":
                self._is_summarised = True
                return response.summary
            case "ack" if not response.ack.HasField("error"):
                self._settle(response.ack.next_offset)
                return response.ack
            case "ack":
                self._refused(response.ack)
        return None

    def _settle(self, next_offset: int) -> None:
        self._move_watermark(next_offset)
        self._failed_tries = 0
        self._stale.clear()
        while self._in_flight and self._in_flight[0] < next_offset:
            self._in_flight.popleft()

    def _refused(self, ack: BulkAck) -> None:
        """Go back to the watermark; the refusals of what was sent behind that message are ignored."""
        if ack.offset in self._stale:
            self._stale.remove(ack.offset)
            return
        self._make_way(ack)
        self._stale.extend(offset for offset in self._in_flight if offset != ack.offset)
        self._in_flight.clear()
        self._move_watermark(ack.next_offset)
        self._outbox.go_back()
        self._is_finish_sent = False

    def _make_way(self, ack: BulkAck) -> None:
        """Change what would make the next try fail as well; raises LoadInterrupted where nothing can."""
        reason, retry = _reason(ack.error), _detail(ack.error, RetryInfo)
        if reason == "TOO_LARGE" and self._outbox.max_rows > 1:
            self._outbox.max_rows //= 2
        elif (reason == "OFFSET_GAP" or retry) and self._failed_tries < self._tries:
            longest = min(self._first_pause_seconds * 2**self._failed_tries, LONGEST_PAUSE_SECONDS)
            told = retry.retry_delay.ToMilliseconds() / 1000 if retry else 0.0
            self._pause_seconds = told + random.uniform(0, longest)  # noqa: S311
            self._failed_tries += 1
        else:
            raise self._interrupted(ack.error)
        log.warning("%s; going on from row %d in %.1f s", reason, ack.next_offset, self._pause_seconds)

    def _move_watermark(self, next_offset: int) -> None:
        if not self._outbox.first <= next_offset <= self._outbox.position:
            told = f"the server is at row {next_offset}, which is not among those that it was sent last"
            raise self._interrupted(_unknown(told))
        self._outbox.forget_below(next_offset)

    async def _pause(self) -> None:
        seconds, self._pause_seconds = self._pause_seconds, 0.0
        await asyncio.sleep(seconds)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _interrupted(self, status: Status) -> LoadInterrupted:
        return LoadInterrupted(status, self._outbox.first)


async def _each(rows: AsyncIterable[Message] | Iterable[Message]) -> AsyncIterator[Message]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row


def _error_of(task: "asyncio.Task[None]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _status_now(call: grpc.aio.Call) -> Status:
    """Return the status of a call that has ended, as it is at this moment: grpc.aio may replace it."""
    try:
        _status(call).send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that has ended waits for nothing")


async def _status(call: grpc.aio.Call) -> Status:
    details = dict(await call.trailing_metadata()).get("grpc-status-details-bin")
    if isinstance(details, bytes):
        return Status.FromString(details)
    return Status(code=(await call.code()).value[0], message=await call.details())


def _unknown(message: str) -> Status:
    return Status(code=grpc.StatusCode.UNKNOWN.value[0], message=message)


def _reason(status: Status) -> str:
    info = _detail(status, ErrorInfo)
    return info.reason if info else ""


def _detail(status: Status, kind: type[Any]) -> Any:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
