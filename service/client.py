"""What an internal service imports: a channel with sane options, and the bulk loader."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc.code_pb2 import FAILED_PRECONDITION, INTERNAL, UNKNOWN
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from roster.v1.bulk_pb2 import BulkAck, BulkOpened, BulkOptions, BulkSummary, BulkWriteResponse

log = logging.getLogger(__name__)

OPTIONS = [
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_receive_message_length", 16 << 20),
    # The server allows a ping every 20 s, also between calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a channel waits up to 2 minutes before it looks for a server that was away.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Otherwise the environment's http_proxy gets even the calls to this machine.
    ("grpc.enable_http_proxy", 0),
]
BATCH_ROWS = 5000
BATCH_BYTES = 4 << 20
ROW_FRAMING_BYTES = 6  # a tag, and a length below 4 GiB
MESSAGE_FRAMING_BYTES = 64
WINDOW = 4
TRIES = 20  # about two minutes
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0
# What ends a call on its way, before the server or a proxy could give a reason.
BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)

Request = TypeVar("Request", bound=Message)
Event = BulkOpened | BulkAck | BulkSummary


def channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Return a channel to `host:port` or `unix:/path`; messages up to 16 MiB, keepalive every 30 s."""
    if credentials:
        return grpc.aio.secure_channel(address, credentials, OPTIONS)
    return grpc.aio.insecure_channel(address, OPTIONS)


def tls_credentials(
    ca: bytes | None = None,
    key: bytes | None = None,
    certificate: bytes | None = None,
    *,
    token: Callable[[], str] | None = None,
) -> grpc.ChannelCredentials:
    """Return what `channel` takes for TLS: the CA of the server, PEM, and what tells the server who calls.

    That is a key with its certificate, or what returns a bearer token. It is asked for each call, in a thread
    of gRPC's, so that it can hand out a new one before the old one expires.
    """
    tls = grpc.ssl_channel_credentials(ca, key, certificate)
    if token is None:
        return tls

    def bearer(_: grpc.AuthMetadataContext, tell: grpc.AuthMetadataPluginCallback) -> None:
        tell((("authorization", f"Bearer {token()}"),), None)

    plugin: Any = bearer
    return grpc.composite_channel_credentials(tls, grpc.metadata_call_credentials(plugin))


class CallFailed(Exception):
    """A call that failed: its `code`, its `message`, the server's `reason`, "" where it gave none.

    `may_pass` tells whether to try again makes sense, `retry_seconds` after how long the server wants that.
    """

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        info, retry = _detail(status, ErrorInfo), _detail(status, RetryInfo)
        self.message: str = status.message
        self.code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        self.reason: str = info.reason if info else ""
        self.retry_seconds: float = retry.retry_delay.ToMilliseconds() / 1000 if retry else 0
        is_broken = not self.reason and self.code in BROKEN
        self.may_pass = is_broken or retry is not None or self.reason == "OUTCOME_UNKNOWN"

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> "CallFailed":
        """Return an error of grpc.aio as what it means."""
        return CallFailed(_status(error.code(), error.details(), error.trailing_metadata()))


class LoadInterrupted(CallFailed):
    """A load that can't go on; the first `acknowledged` of its rows are settled for good."""

    def __init__(self, status: Status, acknowledged: int) -> None:
        super().__init__(status)
        self.acknowledged = acknowledged

    def __str__(self) -> str:
        return f"{self.message} ({self.acknowledged:,} rows were acknowledged)"


class Patience:
    """Tries again what may pass: after longer and longer pauses, with jitter, and not for ever."""

    def __init__(self, tries: int = TRIES, first_pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        self._tries = tries
        self._first_pause_seconds = first_pause_seconds
        self._failed_tries = 0
        self._has_met_server = False

    def renew(self) -> None:
        """Begin anew: a try got somewhere."""
        self._failed_tries = 0
        self._has_met_server = True

    async def endure(self, failure: CallFailed) -> None:
        """Wait before the next try; raises the failure where there should be none."""
        # An address where nobody ever answered is rather a wrong one.
        may_pass = failure.may_pass and (self._has_met_server or failure.reason)
        if not may_pass or self._failed_tries >= self._tries:
            raise failure
        longest = min(self._first_pause_seconds * 2**self._failed_tries, LONGEST_PAUSE_SECONDS)
        self._failed_tries += 1
        seconds = failure.retry_seconds + random.uniform(longest / 2, longest)  # noqa: S311
        log.warning("%s; trying again in %.1f s", failure, seconds)
        await asyncio.sleep(seconds)

    async def call(self, method: Any, request: Message) -> Any:
        """Return the answer of a unary RPC that can be repeated; raises CallFailed."""
        while True:
            try:
                answer = await method(request)
            except grpc.aio.AioRpcError as error:
                await self.endure(CallFailed.of(error))
            else:
                self.renew()
                return answer


class BulkLoader(Generic[Request]):
    """Sends rows through a bulk RPC and hands on what the server answers. A loader makes one load.

    `request` is the message type of `method`. A message has at most `batch_rows` rows, and no more rows and
    bytes than the server allows; at most `window` of them wait for their acks, and only the rows of these
    and of the next one are kept.

    What was not written for a fault that passes is sent again, `tries` times in a row with growing pauses.
    With `load_id` in the options that holds for a stream that breaks too, and a load that an earlier loader
    began is gone on with: its rows have to come again, in the same order, and those that are settled are
    skipped; ListBulkLoadFailures has their failures. With `return_ids` they are not skipped but sent again,
    so that each row has its ack, with its first outcome.
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
        self._batch_rows = batch_rows
        self._window = window
        self._patience = Patience(tries, first_pause_seconds)

        self._unsettled: deque[Any] = deque()  # messages without an ack, the oldest first
        self._sent = 0  # how many of them the stream was sent
        self._stale = 0  # answers to come for messages that were sent behind one that was refused
        self._acknowledged = 0
        self._call: grpc.aio.StreamStreamCall[Request, BulkWriteResponse] | None = None
        self._filling: asyncio.Task[None] | None = None
        self._is_summarised = False
        self._changed = asyncio.Event()

    async def run(self, rows: AsyncIterable[Message]) -> AsyncGenerator[Event, None]:
        """Yield `opened` for each stream, an ack for each message, in order, and the summary.

        The first row is asked for when the load is open. Close it (`contextlib.aclosing`) where it is left
        early: that cancels the call. Raises LoadInterrupted where the load can't go on, and whatever `rows`
        raises.
        """
        try:
            while not self._is_summarised:
                try:
                    async with aclosing(self._stream()) as events:
                        async for event in events:
                            yield event
                            if isinstance(event, BulkOpened) and not self._filling:
                                self._patience.renew()
                                self._filling = self._task(self._fill(rows, event))
                except LoadInterrupted as failure:
                    await self._reopen_after(failure)
        finally:
            if self._filling:
                self._filling.cancel()
                await asyncio.gather(self._filling, return_exceptions=True)

    async def _reopen_after(self, failure: LoadInterrupted) -> None:
        if self._is_summarised and failure.may_pass:
            return
        if not self._options.load_id or self._options.validate_only:
            raise failure
        await self._patience.endure(failure)

    async def _stream(self) -> AsyncGenerator[Event, None]:
        """Yield the events of one stream, until the summary; raises LoadInterrupted where it breaks."""
        if self._filling and self._filling.done():
            self._filling.result()  # it may have failed while there was no call to end
        self._sent = self._stale = 0
        call = self._call = self._method()
        first_told: list[Status] = []
        call.add_done_callback(lambda ended: first_told.append(_status_now(ended)))
        sending = self._task(self._send(call))
        try:
            async for response in call:
                event = await self._event(response)
                self._changed.set()
                if event:
                    yield event
            if not self._is_summarised:
                raise self._interrupted(UNKNOWN, "the server ended the stream without a summary")
        except grpc.aio.AioRpcError:
            # A write that fails as the call ends puts INTERNAL in the place of its status (grpc#36066).
            status = next((told for told in first_told if told.code != INTERNAL), _status_now(call))
            raise LoadInterrupted(status, self._acknowledged) from None
        except asyncio.CancelledError:
            # An error in one of the tasks has cancelled the call; it is the one to raise.
            for task in filter(None, (self._filling, sending)):
                if task.done() and not task.cancelled() and (error := task.exception()):
                    raise error from None
            raise
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    def _task(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do some work beside the call; where it fails the call ends."""

        def check(done: "asyncio.Task[None]") -> None:
            if self._call and (done.cancelled() or done.exception()):
                self._call.cancel()

        task = asyncio.create_task(work)
        task.add_done_callback(check)
        return task

    async def _send(self, call: "grpc.aio.StreamStreamCall[Request, BulkWriteResponse]") -> None:
        # A call that has ended refuses to write; the side that reads knows why.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._request(options=self._options))
            while True:
                await self._until(lambda: not self._stale and self._sent < len(self._unsettled))
                self._sent += 1
                await call.write(self._unsettled[self._sent - 1])

    async def _event(self, response: BulkWriteResponse) -> Event | None:
        if response.HasField("opened"):
            return response.opened
        if response.HasField("summary"):
            self._is_summarised = True
            return response.summary
        return response.ack if await self._is_settled(response.ack) else None

    async def _is_settled(self, ack: BulkAck) -> bool:
        """Take in the answer to a message; one that was refused is sent again, and those behind it."""
        if self._stale:
            self._stale -= 1
            return False
        if not self._sent or ack.offset != self._unsettled[0].offset:
            raise self._interrupted(UNKNOWN, f"the server answered for row {ack.offset} out of turn")
        if ack.HasField("error"):
            await self._patience.endure(LoadInterrupted(ack.error, self._acknowledged))
            self._stale, self._sent = self._sent - 1, 0
            return False
        self._acknowledged += len(getattr(self._unsettled.popleft(), self._rows_field))
        self._sent -= 1
        self._patience.renew()
        return True

    async def _fill(self, rows: AsyncIterable[Message], opened: BulkOpened) -> None:
        async with aclosing(self._cut(rows, opened)) as messages:
            async for message in messages:
                await self._until(lambda: len(self._unsettled) < self._window)
                self._unsettled.append(message)
                self._changed.set()

    async def _cut(self, rows: AsyncIterable[Message], opened: BulkOpened) -> AsyncGenerator[Request, None]:
        """Yield messages as large as they may be, and at last the one that completes the load."""
        start = self._acknowledged = 0 if self._options.return_ids else opened.next_offset
        max_rows = min(self._batch_rows, opened.max_rows)
        max_bytes = min(BATCH_BYTES, opened.max_bytes) - MESSAGE_FRAMING_BYTES
        batch: list[Message] = []
        end = size = 0
        async for row in rows:
            end += 1
            if end <= start:
                continue
            row_size = row.ByteSize() + ROW_FRAMING_BYTES
            if batch and size + row_size > max_bytes:
                yield self._message(end - 1, batch)
                batch, size = [], 0
            batch.append(row)
            size += row_size
            if len(batch) == max_rows:
                yield self._message(end, batch)
                batch, size = [], 0
        if end < start:
            told = f"the load has {start:,} rows already, and here are only {end:,}"
            raise self._interrupted(FAILED_PRECONDITION, told)
        if batch:
            yield self._message(end, batch)
        yield self._request(offset=end, finish=True)

    def _message(self, end: int, rows: list[Message]) -> Request:
        return self._request(offset=end - len(rows), **{self._rows_field: rows})

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _interrupted(self, code: int, message: str) -> LoadInterrupted:
        return LoadInterrupted(Status(code=code, message=message), self._acknowledged)


def _status_now(call: grpc.aio.Call) -> Status:
    """Return the status of a call that has ended, as it is at this moment: grpc.aio may replace it."""
    try:
        _status_of(call).send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that has ended waits for nothing")


async def _status_of(call: grpc.aio.Call) -> Status:
    return _status(await call.code(), await call.details(), await call.trailing_metadata())


def _status(code: grpc.StatusCode, message: str | None, metadata: Any) -> Status:
    details = dict(metadata or ()).get("grpc-status-details-bin")
    if isinstance(details, bytes):
        return Status.FromString(details)
    return Status(code=code.value[0], message=message)


def _detail(status: Status, kind: type[Any]) -> Any:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
