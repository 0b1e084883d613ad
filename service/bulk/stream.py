"""The bulk-stream protocol, written once for every entity.

A message = a batch = a transaction = an ack. A stream has a few messages in hand; then requests are
no longer read, so that memory does not grow with the load.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from roster.v1.bulk_pb2 import BulkOptions, BulkWriteResponse
from service.auth.caller import current_caller
from service.bulk.convert import error_to_message, opened_to_message, outcome_to_message
from service.bulk.message import MAX_BYTES, MAX_ROWS
from service.bulk.operation import Operation
from service.bulk.pending import Slot
from service.bulk.pipeline import Stream
from service.db.engine import Database
from service.errors import Draining, InvalidOptions, RosterError, TooManyFailures
from service.shares import FairSemaphore

# Of all streams: messages that are parsed and not yet written. Parsed they take about four times as much.
MAX_UNWRITTEN_BYTES = 64 << 20


class BulkStreams:
    """Runs the bulk streams of all entities against one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._receivers: set[asyncio.Task[None]] = set()
        self._unwritten = FairSemaphore(MAX_UNWRITTEN_BYTES)
        self._is_draining = False

    def drain(self) -> None:
        """Let every stream answer what it has in hand, and no more."""
        self._is_draining = True
        for receiver in self._receivers:
            receiver.cancel()

    async def run(
        self, requests: AsyncIterator[Any], operation: Operation
    ) -> AsyncGenerator[BulkWriteResponse]:
        """Yield the events of one stream, whose messages come as bytes.

        Its end is no success: a cancelled or killed upload looks like one. Only `finish` completes a load.
        Raises Draining, behind the summary, where the server stops first.
        """
        first = await anext(requests, None)
        if first is None:
            raise InvalidOptions("the stream ended before its first message, which has options or rows")
        sent = operation.parser.parse(first).request.options
        options = BulkOptions.FromString(sent.SerializeToString())
        stream = await Stream.open(self._database, operation, options, current_caller())
        yield opened_to_message(options.load_id, stream.watermark, MAX_ROWS, MAX_BYTES)
        receiver = self._receive(stream, first, requests)
        del first
        try:
            while slot := await stream.slots.get():
                response, is_recorded = await _answer(stream, slot)
                if slot.size or not is_recorded:
                    yield response
                if stream.has_failed_too_often():
                    receiver.cancel()  # what is in hand is still answered
                elif is_recorded and slot.is_last:
                    await stream.finish()
                    yield await stream.summary(is_finished=True)
                    return
            if not (stream.has_failed_too_often() or receiver.cancelled()):
                await receiver  # raises what it ended with
        finally:
            await stream.close(receiver)
        yield await stream.summary(is_finished=False)
        if stream.has_failed_too_often():
            raise TooManyFailures("more rows failed than max_failures allows; what is acknowledged is in")
        if receiver.cancelled():
            raise Draining(
                "the server is stopping; what is acknowledged is in, go on elsewhere at next_offset",
                next_offset=stream.watermark,
            )

    def _receive(self, stream: Stream, first: bytes, requests: AsyncIterator[bytes]) -> asyncio.Task[None]:
        receiver = asyncio.create_task(stream.receive(first, requests, self._unwritten))
        receiver.add_done_callback(lambda _: stream.slots.put_nowait(None))
        receiver.add_done_callback(self._receivers.discard)
        self._receivers.add(receiver)
        if self._is_draining:
            receiver.cancel()
        return receiver


async def _answer(stream: Stream, slot: Slot) -> tuple[BulkWriteResponse, bool]:
    """Wait for a message's outcome; return its ack, and whether it was recorded."""
    outcome = await slot.outcome()
    if isinstance(outcome, RosterError):
        stream.refused(slot, outcome)
        return error_to_message(slot.offset, stream.watermark, outcome), False
    stream.acknowledged(slot, outcome)
    is_replayed = slot.replayed == slot.size
    ack = await outcome_to_message(
        slot.offset,
        stream.watermark if is_replayed else slot.end,
        outcome,
        return_ids=stream.options.return_ids,
        is_replayed=is_replayed,
    )
    return ack, True
