"""Bulk streams: rows -> columns by rules alone, and outcome -> message. Pure."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from roster.errors import RosterError
from roster.errors.codes import status_code
from roster.v1.bulk_pb2 import (
    BulkAck,
    BulkLoad,
    BulkOpened,
    BulkOptions,
    BulkSummary,
    BulkWriteResponse,
)
from service.bulk.builder import BatchBuilder
from service.db.bulk.batch import Batch, Outcome
from service.status import status_from_error
from service.timeslice import add_in_slices
from service.validation import Rule
from service.wire import Fields

MAX_FAILURE_MESSAGE = 200

# Converts rows to columns, given the fields to convert, and those that the update mask names.
ToBatch: TypeAlias = Callable[[Sequence[Any], Collection[str], Collection[str]], Awaitable[Batch]]


def batch_converter(rules: Mapping[str, Rule]) -> ToBatch:
    """Return a function that converts rows to columns, by the rules of their fields alone."""

    async def batch_from_messages(
        messages: Sequence[Any],
        fields: Collection[str],
        masked: Collection[str],  # noqa: ARG001
    ) -> Batch:
        builder = BatchBuilder(messages)
        await builder.add_identity(fields)
        await builder.add_fields(fields, rules)
        return builder.batch

    return batch_from_messages


def opened_to_message(
    load_id: str, caller: str, next_offset: int, max_rows: int, max_bytes: int
) -> BulkWriteResponse:
    """Return the first response of a stream."""
    return BulkWriteResponse(
        opened=BulkOpened(
            load_id=load_id,
            caller=caller,
            next_offset=next_offset,
            max_rows=max_rows,
            max_bytes=max_bytes,
        )
    )


async def outcome_to_message(
    offset: int, next_offset: int, outcome: Outcome, *, return_ids: bool, is_replayed: bool
) -> BulkWriteResponse:
    """Return the acknowledgement of a message whose rows are committed."""
    response = BulkWriteResponse(
        ack=BulkAck(
            offset=offset,
            next_offset=next_offset,
            replayed=is_replayed,
            created=outcome.created,
            updated=outcome.updated,
            skipped=outcome.skipped,
            failed=outcome.failed,
            deleted=outcome.deleted,
            deleted_posts=outcome.deleted_posts,
            ids=outcome.ids if return_ids else None,
        )
    )
    # Added in place and in slices: there may be 5,000 of them.
    failures = [(offset + row, outcome.failures[row]) for row in sorted(outcome.failures)]
    await add_in_slices(response.ack.failures, failure_fields, failures)
    return response


def error_to_message(offset: int, next_offset: int, error: RosterError) -> BulkWriteResponse:
    """Return the acknowledgement of a message that is refused: nothing of it is recorded."""
    return BulkWriteResponse(
        ack=BulkAck(offset=offset, next_offset=next_offset, error=status_from_error(error))
    )


def failure_fields(failure: tuple[int, RosterError]) -> Fields:
    """Return the offset and the error of a failed row as the fields of a RowFailure."""
    offset, error = failure
    return {
        "offset": offset,
        "code": status_code(error).value[0],
        "reason": error.reason,
        "field": error.field,
        "message": error.message[:MAX_FAILURE_MESSAGE],
        "existing_id": int(error.facts.get("existing_id", 0)),
    }


def summary_to_message(
    next_offset: int, counts: Mapping[str, int], state: BulkLoad.State.ValueType
) -> BulkWriteResponse:
    """Return the last response of a stream."""
    return BulkWriteResponse(summary=BulkSummary(next_offset=next_offset, state=state, **counts))


def options_to_store(options: BulkOptions) -> bytes:
    """Return the options of a load to store: without unknown fields, and without repeated paths."""
    return _known(options).SerializeToString(deterministic=True)


def options_effect(options: BulkOptions) -> BulkOptions:
    """Return the options that affect the rows written. The others may differ between streams of a load."""
    effect = _known(options)
    # These two only affect the answers to a stream.
    for field_name in ("return_ids", "max_failures"):
        effect.ClearField(field_name)
    return effect


def _known(options: BulkOptions) -> BulkOptions:
    known = BulkOptions()
    known.CopyFrom(options)
    known.DiscardUnknownFields()
    known.ClearField("caller")  # whose load it is, not what it does
    known.update_mask.paths[:] = dict.fromkeys(options.update_mask.paths)
    if not known.update_mask.paths:
        known.ClearField("update_mask")
    return known
