"""Limits of the server's connections: how many, and how long an idle one stays open."""

import logging
import resource
from contextlib import suppress

from service.settings import Settings

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096  # 22 KiB each, 48 with TLS
# Open files for other purposes: the policy, keys, logs, metrics scrapes, and what libraries open.
RESERVED_FILES = 200
MAX_HEALTH_CONNECTIONS = 256  # on the health port
HANDSHAKE_SECONDS = 10
IDLE_SECONDS = 300


def raise_file_limit(settings: Settings) -> None:
    """Raise the limit of open files to what the connections need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MAX_CONNECTIONS + _reserved(settings)
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    if max_connections(settings) < MAX_CONNECTIONS:
        log.warning(
            "the limit of open files allows %d connections; raise it (ulimit -Hn) to %d for %d",
            max_connections(settings),
            MAX_CONNECTIONS + _reserved(settings),
            MAX_CONNECTIONS,
        )


def max_connections(settings: Settings) -> int:
    """Return how many connections callers may have in all; the rest of the open files is for the database."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - _reserved(settings)))


def connection_options(settings: Settings, limit: int) -> list[tuple[str, int]]:
    """Return gRPC's options for the connections of a port."""
    return [
        # Further connections are closed as soon as they are accepted, so that clients need not wait.
        ("grpc.max_allowed_incoming_connections", limit),
        # From the first byte to the client's SETTINGS, TLS included; by default 2 minutes.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
        ("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000)),
    ]


def _reserved(settings: Settings) -> int:
    """Return how many files may be open besides callers' connections."""
    to_database = settings.pool_size + settings.max_overflow + settings.bulk_connections
    # SQLite opens three files for each connection: the database, its write-ahead log and the log's index.
    return RESERVED_FILES + MAX_HEALTH_CONNECTIONS + 3 * to_database
