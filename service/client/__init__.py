"""What an internal service imports: a channel that retries, domain errors, pages, and the bulk loader."""

from service.client.bulk import BATCH_ROWS, BulkLoader, Event, LoadInterrupted
from service.client.channel import channel
from service.client.errors import DeadlineExceeded, Disconnected
from service.client.pages import pages
from service.client.patience import Patience
from service.client.tls import tls_credentials

__all__ = [
    "BATCH_ROWS",
    "BulkLoader",
    "DeadlineExceeded",
    "Disconnected",
    "Event",
    "LoadInterrupted",
    "Patience",
    "channel",
    "pages",
    "tls_credentials",
]
