"""BulkLoader: loads any number of rows, each exactly once, over one or more bulk streams."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import uuid4

import grpc
from google.protobuf.message import Message
from google.rpc.code_pb2 import INTERNAL, UNKNOWN
from google.rpc.status_pb2 import Status

from roster.client.backoff import FIRST_PAUSE_SECONDS, MAX_RETRIES, Backoff
from roster.client.errors import (
    BODY_ONLY,
    BODY_SIZE,
    ProxyRefused,
    ProxyUnavailable,
    error_from_call,
    error_from_status,
    is_retryable,
    status_of_ended_call,
)
from roster.client.window import Window
from roster.errors import FailedPrecondition, RosterError
from roster.v1.bulk_pb2 import (
    BulkAck,
    BulkLoad,
    BulkOpened,
    BulkOptions,
    BulkSummary,
    BulkWriteResponse,
    GetBulkLoadRequest,
)
from roster.v1.bulk_pb2_grpc import BulkServiceStub

BATCH_ROWS = 5000
BATCH_BYTES = 4 << 20
ROW_FRAMING_BYTES = 6  # a tag, and a length below 4 GiB
MESSAGE_FRAMING_BYTES = 64
WINDOW = 4
MAX_RESETS = 4  # in a row, without progress
PROBE_SECONDS = 5.0

Request = TypeVar("Request", bound=Message)
Event = BulkOpened | BulkAck | BulkSummary
Rows: TypeAlias = AsyncIterable[Message] | Callable[[int], AsyncIterable[Message]]


class LoadInterrupted(RosterError):
    """The load can't continue, because of `cause`; its first `acknowledged` rows are settled."""

    def __init__(self, cause: RosterError, acknowledged: int) -> None:
        super().__init__(cause.message, field=cause.field)
        self.args = (cause, acknowledged)  # of this class, for copies and pickles
        self.facts = cause.facts
        self.reason, self.retry_after_seconds = cause.reason, cause.retry_after_seconds
        self.cause = cause
        self.acknowledged = acknowledged

    def __str__(self) -> str:
        return f"{self.message} ({self.acknowledged:,} rows were acknowledged)"


class BulkLoader(Generic[Request]):
    """Sends rows through a bulk RPC and yields the server's events. One loader runs one load.

    `request` is the request type of `method`. Messages have at most `batch_rows` rows, and never more rows or
    bytes than the server allows. At most `window` messages wait for their acks, so memory is bounded by the
    window and the message being filled.

    Messages that the server refuses with a retryable error are sent again, with increasing pauses, up to
    `max_retries` times in a row. If the options have a `load_id`, a broken stream is reopened too, and a load
    that an earlier loader began is resumed: pass the same rows in the same order, and those already settled
    are skipped (ListBulkLoadFailures returns their failures). With `return_ids` they are sent again instead,
    so that each row has its ack, with its first outcome. Without options, the load gets a random `load_id`.
    An admin resumes the load of another caller with the `caller` of the options.

    `retry_connect` decides what happens if no server has answered yet: retry, or fail at once. With
    `connection`, the channel of the method, the load continues as soon as a server that was away is back, and
    not only at the end of the current pause; and if a proxy refuses the load, the error says how.
    """

    def __init__(
        self,
        method: "grpc.aio.StreamStreamMultiCallable[Request, BulkWriteResponse]",
        request: type[Request],
        options: BulkOptions | None = None,
        *,
        batch_rows: int = BATCH_ROWS,
        window: int = WINDOW,
        max_retries: int = MAX_RETRIES,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        retry_connect: bool = True,
        connection: grpc.aio.Channel | None = None,
    ) -> None:
        self._method = method
        self._request = request
        self._rows_field = next(field.name for field in request.DESCRIPTOR.fields if field.is_repeated)
        self._options = options or BulkOptions(load_id=str(uuid4()))
        self._batch_rows = batch_rows
        self._backoff = Backoff(max_retries, first_pause_seconds, retry_connect=retry_connect)
        self._connection = connection
        if connection:
            self._backoff.watch(connection)

        self._window: Window[Any] = Window(window)
        self._window_changed = asyncio.Event()
        self._acknowledged = 0  # rows
        self._resets = 0  # of streams in a row that broke before an ack
        self._is_finished = False  # the summary has arrived
        self._call: grpc.aio.StreamStreamCall[Request, BulkWriteResponse] | None = None
        self._filling: asyncio.Task[None] | None = None  # reads the rows; outlives the streams

    async def run(self, rows: Rows) -> AsyncGenerator[Event, None]:
        """Yield `opened` for each stream, an ack for each message, in order, and the summary.

        If the source can skip rows cheaply, pass a function that returns the rows from an offset on. The
        first row is read once the load is open. If you leave the iteration early, close it
        (`contextlib.aclosing`): that cancels the call. Raises LoadInterrupted if the load can't continue, and
        any exception of `rows`.
        """
        try:
            while not self._is_finished:
                try:
                    async with aclosing(self._stream()) as events:
                        async for event in events:
                            yield event
                            if isinstance(event, BulkOpened) and not self._filling:
                                self._backoff.reset()
                                self._filling = self._start(self._fill(rows, event))
                except LoadInterrupted as failure:
                    await self._wait_to_reopen(failure)
        finally:
            if self._filling:
                self._filling.cancel()
                await asyncio.gather(self._filling, return_exceptions=True)

    async def _wait_to_reopen(self, failure: LoadInterrupted) -> None:
        # A connection that breaks after the summary has lost nothing.
        if self._is_finished and is_retryable(failure.cause):
            return
        if not self._options.load_id or self._options.validate_only:
            raise failure
        await self._backoff.wait(failure.cause, failure)

    async def _stream(self) -> AsyncGenerator[Event, None]:
        """Yield the events of one stream, until the summary; raises LoadInterrupted if it breaks."""
        if self._filling and self._filling.done():
            self._filling.result()  # raises, if the rows failed between two streams
        self._window.restart()
        call = self._call = self._method()
        # A write that fails while the call ends replaces the call's status by INTERNAL (grpc#36066), so keep
        # its first status too.
        first_status: list[Status] = []
        call.add_done_callback(lambda ended: first_status.append(status_of_ended_call(ended)))
        sending = self._start(self._send(call))
        is_open = False
        try:
            async for response in call:
                is_open = True
                event = await self._receive(response)
                self._window_changed.set()
                if event:
                    yield event
            if not self._is_finished:
                raise self._protocol_error("the server ended the stream without a summary")
        except grpc.aio.AioRpcError:
            statuses = [*first_status, status_of_ended_call(call)]
            status = next((status for status in statuses if status.code != INTERNAL), statuses[-1])
            raise self._interruption(await self._explain(status, is_open=is_open)) from None
        except asyncio.CancelledError:
            # A task that failed has cancelled the call: raise its error instead.
            for task in filter(None, (self._filling, sending)):
                if task.done() and not task.cancelled() and (error := task.exception()):
                    raise error from None
            raise
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _explain(self, status: Status, *, is_open: bool) -> RosterError:
        """Return the error of a stream that broke: what a proxy did, if gRPC does not say."""
        error = error_from_status(status)
        is_unclear = status.code == INTERNAL or BODY_ONLY in status.message
        if status.details or not is_unclear:
            return error
        if not is_open and (refusal := await self._refusal_by_proxy()):
            return refusal
        # The call was accepted, and then reset without a reason. A server that stops gives one. The reset can
        # overtake the first response if the rows of a broken stream were sent again at once.
        self._resets += 1
        if self._resets < MAX_RESETS:
            return error
        return ProxyRefused(f"a proxy resets the stream whenever rows are sent; {BODY_SIZE}")

    async def _refusal_by_proxy(self) -> RosterError | None:
        """Return the error of a proxy that refuses calls; None if there is none.

        A proxy may answer while messages are being written. The write fails then, and its INTERNAL replaces
        the proxy's status (grpc#36066). A unary call gets that status. Its own answer does not matter.
        """
        if not self._connection:
            return None
        loads: Any = BulkServiceStub(self._connection)
        request = GetBulkLoadRequest(load_id=self._options.load_id or "none")
        try:
            await loads.GetBulkLoad(request, timeout=PROBE_SECONDS)
        except grpc.aio.AioRpcError as failure:
            error = error_from_call(failure)
        except RosterError as failure:  # from a channel of ours
            error = failure
        else:
            return None
        return error if isinstance(error, ProxyRefused | ProxyUnavailable) else None

    def _start(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        """Run work in a task that cancels the call if it fails."""

        def cancel_call(done: "asyncio.Task[None]") -> None:
            if self._call and (done.cancelled() or done.exception()):
                self._call.cancel()

        task = asyncio.create_task(work)
        task.add_done_callback(cancel_call)
        return task

    async def _send(self, call: "grpc.aio.StreamStreamCall[Request, BulkWriteResponse]") -> None:
        # A call that has ended refuses writes; the reading side raises the reason.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._request(options=self._options))
            while True:
                await self._wait_until(lambda: self._window.can_send)
                await call.write(self._window.next_unsent())

    async def _receive(self, response: BulkWriteResponse) -> Event | None:
        """Apply a response to the window; return the event to yield, if it is one."""
        if response.HasField("opened"):
            return response.opened
        if response.HasField("ack"):
            is_settled = await self._apply(response.ack)
            return response.ack if is_settled else None
        # A summary ends the load only if it is FINISHED (a server that stops sends one too) and nothing but
        # the finish message is pending: if a message was refused that an earlier stream had recorded, the
        # acks of those after it are still to come.
        has_acks_to_come = len(self._window) > 1
        self._is_finished = response.summary.state == BulkLoad.FINISHED and not has_acks_to_come
        return response.summary if self._is_finished else None

    async def _apply(self, ack: BulkAck) -> bool:
        """Return whether the ack settles the oldest message; otherwise it is stale, or a refusal."""
        if self._window.drop_stale_answer():
            return False
        oldest = self._window.oldest
        if oldest is None or ack.offset != oldest.offset:
            raise self._protocol_error(f"the server sent an unexpected ack for row {ack.offset}")
        if ack.HasField("error"):
            cause = error_from_status(ack.error)
            # Messages sent during the pause are refused as well, so the window is rewound after it.
            await self._backoff.wait(cause, self._interruption(cause))
            self._window.refuse()
            return False
        message = self._window.acknowledge()
        self._resets = 0
        self._acknowledged += len(getattr(message, self._rows_field))
        self._backoff.reset()
        return True

    async def _fill(self, rows: Rows, opened: BulkOpened) -> None:
        async with aclosing(self._messages(rows, opened)) as messages:
            async for message in messages:
                await self._wait_until(lambda: not self._window.is_full)
                self._window.add(message)
                self._window_changed.set()

    async def _messages(self, rows: Rows, opened: BulkOpened) -> AsyncGenerator[Request, None]:
        """Yield messages that are as large as allowed, then the one that finishes the load."""
        start = self._acknowledged = 0 if self._options.return_ids else opened.next_offset
        max_rows = min(self._batch_rows, opened.max_rows)
        max_bytes = min(BATCH_BYTES, opened.max_bytes) - MESSAGE_FRAMING_BYTES
        batch: list[Message] = []
        end = size = 0
        if callable(rows):
            rows, end = rows(start), start
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
            message = f"the source has only {end:,} rows, but the load already has {start:,}"
            raise self._interruption(FailedPrecondition(message))
        if batch:
            yield self._message(end, batch)
        yield self._request(offset=end, finish=True)

    def _message(self, end: int, rows: list[Message]) -> Request:
        return self._request(offset=end - len(rows), **{self._rows_field: rows})

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._window_changed.clear()
            await self._window_changed.wait()

    def _interruption(self, cause: RosterError) -> LoadInterrupted:
        return LoadInterrupted(cause, self._acknowledged)

    def _protocol_error(self, message: str) -> LoadInterrupted:
        return self._interruption(error_from_status(Status(code=UNKNOWN, message=message)))
