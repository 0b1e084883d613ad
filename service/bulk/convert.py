"""Bulk streams: the columns that all entities have, and outcome -> message. Pure."""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeAlias

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.v1.bulk_pb2 import (
    BulkAck,
    BulkLoad,
    BulkOpened,
    BulkOptions,
    BulkSummary,
    BulkWriteResponse,
)
from service.db.bulk.batch import Batch, Outcome
from service.errors import RosterError
from service.status import status_code, status_from_error
from service.timeslice import add_in_slices
from service.validation import Rule, id_error, version_error
from service.wire import Fields, datetime_from_timestamp, timestamp_error

MAX_FAILURE_MESSAGE = 200

# Converts rows to columns, given the fields to convert, and those that the update mask names.
ToBatch: TypeAlias = Callable[[Sequence[Any], Collection[str], Collection[str]], Batch]


def add_identity(batch: Batch, messages: Sequence[Any], fields: Collection[str]) -> None:
    """Add the columns that every entity has: id and version, for restored rows the times too."""
    # A restored row has its times, and may have its id and version.
    if "created_at" in fields:
        batch.add("id", [message.id or None for message in messages], id_error)
        batch.add("version", [message.version or 1 for message in messages], version_error)
        for name in ("created_at", "updated_at"):
            _add_times(batch, name, messages)
    # An update names its row by id; a version of 0 matches any.
    elif "id" in fields:
        batch.add("id", [message.id for message in messages], id_error)
        batch.add("version", [message.version for message in messages], version_error)


def _add_times(batch: Batch, name: str, messages: Sequence[Message]) -> None:
    moments: list[Timestamp | None] = [None] * batch.size
    for row, message in enumerate(messages):
        if message.HasField(name):
            moments[row] = getattr(message, name)
    batch.add(name, moments, timestamp_error)
    times: list[datetime | None] = [None] * batch.size
    for row, moment in enumerate(moments):
        if moment is not None and row not in batch.failures:
            times[row] = datetime_from_timestamp(moment)
    batch.columns[name] = times


def add_fields(
    batch: Batch, messages: Sequence[Message], fields: Collection[str], rules: Mapping[str, Rule]
) -> None:
    """Add a column for each of the fields that has a rule."""
    for name, rule in rules.items():
        if name in fields:
            values = list(map(attrgetter(name), messages))
            batch.add(name, values, rule.error, is_sound=rule.accepts_all(values))


def batch_converter(rules: Mapping[str, Rule]) -> ToBatch:
    """Return a function that converts rows to columns, by the rules of their fields alone."""

    def batch_from_messages(
        messages: Sequence[Any],
        fields: Collection[str],
        masked: Collection[str],  # noqa: ARG001
    ) -> Batch:
        batch = Batch(len(messages))
        add_identity(batch, messages, fields)
        add_fields(batch, messages, fields, rules)
        return batch

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
