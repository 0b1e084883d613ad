"""The bulk-stream protocol, for every entity: the generator behind each bulk RPC.

The first response says where the load is. Then every message is answered by one acknowledgement, in order.
The last response is a summary. pipeline.py describes what happens to a message in between.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from roster.errors import (
    Draining,
    InvalidOptions,
    LoadAborted,
    OptionsChanged,
    RosterError,
    TooManyFailures,
)
from roster.v1.bulk_pb2 import BulkLoad, BulkOptions, BulkWriteResponse
from service.auth.caller import Caller, current_caller
from service.bulk.committer import BatchCommitter, expired
from service.bulk.convert import (
    error_to_message,
    opened_to_message,
    options_effect,
    options_to_store,
    outcome_to_message,
    summary_to_message,
)
from service.bulk.message import MAX_BYTES, MAX_ROWS
from service.bulk.operation import Operation, StreamOptions
from service.bulk.pending import PendingBatch
from service.bulk.pipeline import Pipeline
from service.db.bulk.batch import Outcome
from service.db.engine import Database
from service.interceptors.audit import note_dry_run
from service.loads.model import COUNTED, Load, LoadState
from service.loads.repository import LoadRepository
from service.loads.rules import check_load_id, check_new_load_id, check_owner
from service.shares import FairSemaphore

# Of all streams: messages that are parsed and not yet written. Once parsed, they take four times as much.
MAX_UNWRITTEN_BYTES = 64 << 20


class BulkStreams:
    """Runs the bulk streams of all entities against one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._receivers: set[asyncio.Task[None]] = set()
        self._unwritten = FairSemaphore(MAX_UNWRITTEN_BYTES)
        self._is_draining = False

    def drain(self) -> None:
        """Stop receiving. Every stream still answers the messages that it has received."""
        self._is_draining = True
        for receiver in self._receivers:
            receiver.cancel()

    async def run(
        self, requests: AsyncIterator[Any], operation: Operation
    ) -> AsyncGenerator[BulkWriteResponse]:
        """Yield the responses of one stream, whose messages come as bytes.

        The end of the requests does not complete the load: a cancelled or killed upload looks the same. Only
        `finish` completes it. Raises Draining, after the summary, if the server stops first.
        """
        # Open: the first message has the options.
        first = await anext(requests, None)
        if first is None:
            raise InvalidOptions("the stream ended before its first message, which has options or rows")
        sent = operation.parser.parse(first).request.options
        message = BulkOptions.FromString(sent.SerializeToString())
        options, caller = StreamOptions.from_message(message, operation), current_caller()
        if options.write.validate_only:
            note_dry_run()
        load = await open_load(self._database, operation, message, caller)
        committer = BatchCommitter(self._database, operation, options.write, load)
        pipeline = Pipeline(operation, options, caller, load, committer)
        owner = load.caller if load else ""
        yield opened_to_message(message.load_id, owner, committer.watermark, MAX_ROWS, MAX_BYTES)

        # Answer: the receiver fills the queue, this loop empties it.
        receiver = self._receive(pipeline, first, requests)
        del first
        try:
            while pending := await pipeline.pending.get():
                result = await pending.result()
                has_failed = isinstance(result, RosterError)
                response = await _acknowledge(pipeline, committer, pending, result, options)
                # A message with `finish` alone has no acknowledgement of its own.
                if pending.size or has_failed:
                    yield response
                if pipeline.has_too_many_failures():
                    receiver.cancel()  # the messages already received are still answered
                elif pending.has_finish and not has_failed:
                    await self._finish(load)
                    yield await self._summary(pipeline, committer, load, is_finished=True)
                    return
            if not (pipeline.has_too_many_failures() or receiver.cancelled()):
                await receiver  # raises the error that ended it, if any
        finally:
            await pipeline.close(receiver)

        # End without `finish`: the load stays open.
        yield await self._summary(pipeline, committer, load, is_finished=False)
        if pipeline.has_too_many_failures():
            raise TooManyFailures("more rows failed than max_failures allows; acknowledged rows are kept")
        if receiver.cancelled():
            raise Draining(
                "the server is stopping; acknowledged rows are kept, go on at next_offset with a new stream",
                next_offset=committer.watermark,
            )

    def _receive(
        self, pipeline: Pipeline, first: bytes, requests: AsyncIterator[bytes]
    ) -> asyncio.Task[None]:
        receiver = asyncio.create_task(pipeline.receive(first, requests, self._unwritten))
        # The end of the queue comes after all messages, however the receiver ends.
        receiver.add_done_callback(lambda _: pipeline.pending.put_nowait(None))
        receiver.add_done_callback(self._receivers.discard)
        self._receivers.add(receiver)
        # A stream that opens during a drain still gets its summary.
        if self._is_draining:
            receiver.cancel()
        return receiver

    async def _finish(self, load: Load | None) -> None:
        """Complete the load; raises LoadFenced if another stream has it."""
        if load and load.state == LoadState.OPEN:
            async with self._database.begin() as session:
                await LoadRepository(session, load.caller).finish(load)

    async def _summary(
        self, pipeline: Pipeline, committer: BatchCommitter, load: Load | None, *, is_finished: bool
    ) -> BulkWriteResponse:
        """Return the last response; for a named load with the numbers of all its streams."""
        if load is None:
            state = BulkLoad.FINISHED if is_finished else BulkLoad.STATE_UNSPECIFIED
            return summary_to_message(committer.watermark, pipeline.counts, state)
        async with self._database.read() as session:
            load = await LoadRepository(session, load.caller).get(load.load_id)
        counts = {name: getattr(load, name) for name in COUNTED}
        return summary_to_message(load.next_offset, counts, BulkLoad.State.ValueType(load.state))


async def open_load(
    database: Database, operation: Operation, message: BulkOptions, caller: Caller
) -> Load | None:
    """Begin or continue the load that the options name, and fence off its older streams.

    Returns None if they name none, or if nothing is to be written.
    """
    if message.restore:
        caller.require("admin", "restore")
    owner = check_owner(message.caller, caller, "options.caller") or caller.identity
    if message.caller and not message.load_id:
        raise InvalidOptions("options.caller needs options.load_id", field="options.caller")
    if message.load_id:
        check_load_id(message.load_id, "options.load_id")
    if not message.load_id or message.validate_only:
        return None
    # An error in here rolls back: the load does not begin, and older streams are not fenced off.
    async with database.begin() as session:
        loads = LoadRepository(session, owner)
        # An admin continues another caller's load, but never begins one in the name of that caller. Without
        # `caller`, an admin begins a load too: it must not fence off that of another caller by accident.
        if owner == caller.identity:
            load = await loads.open(message.load_id, operation.method, options_to_store(message))
        else:
            load = await loads.resume(message.load_id)
        if load.epoch == 1:  # it has just begun
            check_new_load_id(message.load_id, "options.load_id")
        if load.state == LoadState.EXPIRED:  # its options are deleted
            raise expired()
        first = BulkOptions.FromString(load.options)
        if load.method != operation.method or options_effect(first) != options_effect(message):
            raise OptionsChanged(
                "the load began with another operation or other options; use those, or another load_id",
                field="options",
            )
        if load.state == LoadState.ABORTED:
            raise LoadAborted("the load was aborted; use another load_id")
    return load


async def _acknowledge(
    pipeline: Pipeline,
    committer: BatchCommitter,
    pending: PendingBatch,
    result: Outcome | RosterError,
    options: StreamOptions,
) -> BulkWriteResponse:
    """Count a message and return its acknowledgement."""
    if isinstance(result, RosterError):
        pipeline.refuse(pending, result)
        return error_to_message(pending.offset, committer.watermark, result)
    pipeline.acknowledge(pending, result)
    is_replayed = pending.replayed == pending.size
    return await outcome_to_message(
        pending.offset,
        committer.watermark if is_replayed else pending.end,
        result,
        return_ids=options.return_ids,
        is_replayed=is_replayed,
    )
