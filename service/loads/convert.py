"""Loads: models -> messages. Pure."""

from datetime import timedelta
from typing import Any

from roster.v1.bulk_pb2 import BulkLoad, BulkLoadRow, BulkOptions
from service.db.bulk.batch import Result
from service.loads.model import Load
from service.loads.repository import LoadRow
from service.wire import timestamp_fields

OUTCOMES = {
    Result.FAILED: BulkLoadRow.FAILED,
    Result.CREATED: BulkLoadRow.CREATED,
    Result.UPDATED: BulkLoadRow.UPDATED,
    Result.SKIPPED: BulkLoadRow.SKIPPED,
    Result.DELETED: BulkLoadRow.DELETED,
}


def load_to_message(load: Load, kept_for: timedelta) -> BulkLoad:
    """Return the message of a load."""
    return BulkLoad(**load_fields(load, kept_for))


def load_fields(load: Load, kept_for: timedelta) -> dict[str, Any]:
    """Return the fields of a load's message."""
    return {
        "caller": load.caller,
        "load_id": load.load_id,
        "method": load.method,
        "state": load.state,
        "options": BulkOptions.FromString(load.options),
        "next_offset": load.next_offset,
        "created": load.created,
        "updated": load.updated,
        "skipped": load.skipped,
        "failed": load.failed,
        "deleted": load.deleted,
        "deleted_posts": load.deleted_posts,
        "created_at": timestamp_fields(load.created_at),
        "updated_at": timestamp_fields(load.updated_at),
        "expires_at": timestamp_fields(load.updated_at + kept_for),
    }


def load_row_fields(row: LoadRow) -> dict[str, Any]:
    """Return the fields of the message of a load's row."""
    return {"offset": row.offset, "outcome": OUTCOMES[Result(row.result)], "id": row.id}
