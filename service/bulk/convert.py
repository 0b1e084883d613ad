"""Bulk streams and loads: outcome -> message. Pure."""

from collections.abc import Mapping
from datetime import timedelta

from roster.v1.bulk_pb2 import (
    BulkAck,
    BulkLoad,
    BulkOpened,
    BulkOptions,
    BulkSummary,
    BulkWriteResponse,
    RowFailure,
)
from service.db.bulk.batch import Outcome
from service.db.bulk.loads import Load
from service.errors import RosterError
from service.fields import timestamp
from service.interceptors.errors import status_code, status_from_error

MAX_FAILURE_MESSAGE = 200


def opened_to_message(load_id: str, next_offset: int, max_rows: int, max_bytes: int) -> BulkWriteResponse:
    """Return the answer to a stream's first message."""
    return BulkWriteResponse(
        opened=BulkOpened(load_id=load_id, next_offset=next_offset, max_rows=max_rows, max_bytes=max_bytes)
    )


def outcome_to_message(
    offset: int, next_offset: int, outcome: Outcome, *, return_ids: bool, is_replayed: bool
) -> BulkWriteResponse:
    """Return the acknowledgement of a message whose rows are recorded."""
    failures = sorted(outcome.failures.items())
    return BulkWriteResponse(
        ack=BulkAck(
            offset=offset,
            next_offset=next_offset,
            replayed=is_replayed,
            created=outcome.created,
            updated=outcome.updated,
            skipped=outcome.skipped,
            failed=outcome.failed,
            ids=outcome.ids if return_ids else None,
            failures=[failure_to_message(offset + row, error) for row, error in failures],
        )
    )


def error_to_message(offset: int, next_offset: int, error: RosterError) -> BulkWriteResponse:
    """Return the acknowledgement of a message of which nothing was recorded."""
    return BulkWriteResponse(
        ack=BulkAck(offset=offset, next_offset=next_offset, error=status_from_error(error))
    )


def failure_to_message(offset: int, error: RosterError) -> RowFailure:
    """Return why a row failed."""
    return RowFailure(
        offset=offset,
        code=status_code(error).value[0],
        reason=error.reason,
        field=error.field,
        message=error.message[:MAX_FAILURE_MESSAGE],
        existing_id=int(error.facts.get("existing_id", 0)),
    )


def summary_to_message(
    next_offset: int, counts: Mapping[str, int], state: BulkLoad.State.ValueType
) -> BulkWriteResponse:
    """Return the end of a stream."""
    return BulkWriteResponse(summary=BulkSummary(next_offset=next_offset, state=state, **counts))


def load_to_message(load: Load, kept_for: timedelta) -> BulkLoad:
    """Return a load as the API shows it."""
    return BulkLoad(
        load_id=load.load_id,
        method=load.method,
        state=BulkLoad.State.ValueType(load.state),
        options=BulkOptions.FromString(load.options),
        next_offset=load.next_offset,
        created=load.created,
        updated=load.updated,
        skipped=load.skipped,
        failed=load.failed,
        created_at=timestamp(load.created_at),
        updated_at=timestamp(load.updated_at),
        expires_at=timestamp(load.updated_at + kept_for),
    )
