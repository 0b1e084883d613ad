"""BulkLoader: any number of rows through one bulk stream after the other, each row once."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Generic, TypeVar
from uuid import uuid4

import grpc
from google.protobuf.message import Message
from google.rpc.code_pb2 import INTERNAL, UNKNOWN
from google.rpc.status_pb2 import Status

from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOpened, BulkOptions, BulkSummary, BulkWriteResponse
from service.client.errors import error_from_status, may_pass, status_of
from service.client.patience import FIRST_PAUSE_SECONDS, TRIES, Patience
from service.errors import FailedPrecondition, RosterError

BATCH_ROWS = 5000
BATCH_BYTES = 4 << 20
ROW_FRAMING_BYTES = 6  # a tag, and a length below 4 GiB
MESSAGE_FRAMING_BYTES = 64
WINDOW = 4

Request = TypeVar("Request", bound=Message)
Event = BulkOpened | BulkAck | BulkSummary


class LoadInterrupted(RosterError):
    """A load that can't go on, and the `cause`; the first `acknowledged` of its rows are settled for good."""

    def __init__(self, cause: RosterError, acknowledged: int) -> None:
        super().__init__(cause.message, field=cause.field, **cause.facts)
        self.reason, self.retry_after_seconds = cause.reason, cause.retry_after_seconds
        self.cause = cause
        self.acknowledged = acknowledged

    def __str__(self) -> str:
        return f"{self.message} ({self.acknowledged:,} rows were acknowledged)"


class BulkLoader(Generic[Request]):
    """Sends rows through a bulk RPC and hands on what the server answers. A loader makes one load.

    `request` is the message type of `method`. A message has at most `batch_rows` rows, and no more rows and
    bytes than the server allows; at most `window` of them wait for their acks, and only the rows of these
    and of the next one are kept.

    What was not written for a fault that passes is sent again, `tries` times in a row with growing pauses.
    With `load_id` in the options that holds for a stream that breaks too, and a load that an earlier loader
    began is gone on with: its rows have to come again, in the same order, and those that are settled are
    skipped; ListBulkLoadFailures has their failures. With `return_ids` they are not skipped but sent again,
    so that each row has its ack, with its first outcome. Without any options the load gets a name of its own.
    Where no server has ever answered it is tried again too, unless the address is not known to be right.
    """

    def __init__(
        self,
        method: "grpc.aio.StreamStreamMultiCallable[Request, BulkWriteResponse]",
        request: type[Request],
        options: BulkOptions | None = None,
        *,
        batch_rows: int = BATCH_ROWS,
        window: int = WINDOW,
        tries: int = TRIES,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        is_known: bool = True,
    ) -> None:
        self._method = method
        self._request = request
        self._rows_field = next(field.name for field in request.DESCRIPTOR.fields if field.is_repeated)
        self._options = options or BulkOptions(load_id=str(uuid4()))
        self._batch_rows = batch_rows
        self._window = window
        self._patience = Patience(tries, first_pause_seconds, is_known=is_known)

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
        if self._is_summarised and may_pass(failure.cause):
            return
        if not self._options.load_id or self._options.validate_only:
            raise failure
        await self._patience.endure(failure.cause, failure)

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
                raise self._broken("the server ended the stream without a summary")
        except grpc.aio.AioRpcError:
            # A write that fails as the call ends puts INTERNAL in the place of its status (grpc#36066).
            status = next((told for told in first_told if told.code != INTERNAL), _status_now(call))
            raise self._interrupted(error_from_status(status)) from None
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
            # A server that stops has one too, of a load that is to go on. And where a message was refused
            # that an earlier stream had recorded, those behind it were taken: their acks are to come yet.
            is_settled = len(self._unsettled) <= 1
            self._is_summarised = is_settled and response.summary.state == BulkLoad.FINISHED
            return response.summary if self._is_summarised else None
        return response.ack if await self._is_settled(response.ack) else None

    async def _is_settled(self, ack: BulkAck) -> bool:
        """Take in the answer to a message; one that was refused is sent again, and those behind it."""
        if self._stale:
            self._stale -= 1
            return False
        if not self._sent or ack.offset != self._unsettled[0].offset:
            raise self._broken(f"the server answered for row {ack.offset} out of turn")
        if ack.HasField("error"):
            cause = error_from_status(ack.error)
            await self._patience.endure(cause, self._interrupted(cause))
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
            raise self._interrupted(FailedPrecondition(told))
        if batch:
            yield self._message(end, batch)
        yield self._request(offset=end, finish=True)

    def _message(self, end: int, rows: list[Message]) -> Request:
        return self._request(offset=end - len(rows), **{self._rows_field: rows})

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _interrupted(self, cause: RosterError) -> LoadInterrupted:
        return LoadInterrupted(cause, self._acknowledged)

    def _broken(self, message: str) -> LoadInterrupted:
        return self._interrupted(error_from_status(Status(code=UNKNOWN, message=message)))


def _status_now(call: grpc.aio.Call) -> Status:
    """Return the status of a call that has ended, as it is at this moment: grpc.aio may replace it."""
    try:
        _status_of(call).send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that has ended waits for nothing")


async def _status_of(call: grpc.aio.Call) -> Status:
    return status_of(await call.code(), await call.details(), await call.trailing_metadata())
