"""Client library: a channel with retries and deadlines, domain errors, pagination, and a bulk loader."""

from service.client.backoff import Backoff
from service.client.bulk import BATCH_ROWS, BulkLoader, Event, LoadInterrupted
from service.client.channel import channel
from service.client.errors import DeadlineExceeded, Disconnected
from service.client.pages import pages
from service.client.tls import local_credentials, tls_credentials

__all__ = [
    "BATCH_ROWS",
    "Backoff",
    "BulkLoader",
    "DeadlineExceeded",
    "Disconnected",
    "Event",
    "LoadInterrupted",
    "channel",
    "local_credentials",
    "pages",
    "tls_credentials",
]
