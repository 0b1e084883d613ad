"""Loads: model -> message. Pure."""

from datetime import timedelta
from typing import Any

from roster.v1.bulk_pb2 import BulkLoad, BulkOptions
from service.fields import timestamp
from service.loads.model import Load


def load_to_message(load: Load, kept_for: timedelta) -> BulkLoad:
    """Return a load as the API shows it."""
    return BulkLoad(**load_fields(load, kept_for))


def load_fields(load: Load, kept_for: timedelta) -> dict[str, Any]:
    """Return a load as the fields of its message."""
    return {
        "load_id": load.load_id,
        "method": load.method,
        "state": load.state,
        "options": BulkOptions.FromString(load.options),
        "next_offset": load.next_offset,
        "created": load.created,
        "updated": load.updated,
        "skipped": load.skipped,
        "failed": load.failed,
        "created_at": timestamp(load.created_at),
        "updated_at": timestamp(load.updated_at),
        "expires_at": timestamp(load.updated_at + kept_for),
    }
