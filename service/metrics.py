"""Prometheus metrics of the service; docs/operating.md explains each.

With several workers, `PROMETHEUS_MULTIPROC_DIR` is the folder in which they share their values.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.scrapes import ScrapeServer
from service.settings import Settings

log = logging.getLogger(__name__)

# The creation time of each metric would double the number of lines.
disable_created_metrics()  # type: ignore[no-untyped-call]

CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STATEMENT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 30)
BATCH_ROWS = (1, 10, 100, 500, 1000, 2000, 3000, 4000, 5000)
GATHERED = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Named and labelled as in go-grpc-middleware, so that dashboards for it work.
METHOD = ("grpc_type", "grpc_service", "grpc_method")
STARTED = Counter("grpc_server_started_total", "Calls started.", METHOD)
HANDLED = Counter("grpc_server_handled_total", "Calls ended.", (*METHOD, "grpc_code"))
HANDLING = Histogram("grpc_server_handling_seconds", "Duration of calls.", METHOD, buckets=CALL_SECONDS)


def _level(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
    """Return a gauge whose value is the sum over all running workers."""
    return Gauge(name, text, labels, multiprocess_mode="livesum")


READY = Gauge(
    "roster_ready",
    "1 while health is SERVING, otherwise 0; the minimum of all workers.",
    multiprocess_mode="livemin",
)
CALLS = _level("roster_calls_in_flight", "Calls and streams in flight.", METHOD)

BULK_ROWS = Counter("roster_bulk_rows_total", "Acknowledged rows.", ("operation", "outcome"))
BULK_REFUSED = Counter("roster_bulk_refused_total", "Messages refused as a whole.", ("operation", "reason"))
BULK_BATCH_ROWS = Histogram(
    "roster_bulk_batch_rows", "Rows in a committed message.", ("operation",), buckets=BATCH_ROWS
)
BULK_BATCH = Histogram(
    "roster_bulk_batch_seconds",
    "Time from receiving a message to its commit.",
    ("operation",),
    buckets=CALL_SECONDS,
)
BULK_LAG = _level("roster_bulk_rows_uncommitted", "Rows received but not committed yet.")

POOL_SIZE = _level("roster_pool_connections", "Open database connections.", ("pool",))
POOL_IN_USE = _level("roster_pool_connections_in_use", "Database connections in use.", ("pool",))
POOL_WAITING = _level(
    "roster_pool_waiting", "Calls waiting for a database connection, or for the SQLite writer.", ("pool",)
)
POOL_TIMEOUTS = Counter(
    "roster_pool_timeouts_total", "Waits for a database connection that timed out.", ("pool",)
)
STATEMENTS = Histogram(
    "roster_statement_seconds", "Duration of statements.", ("operation",), buckets=STATEMENT_SECONDS
)
GATHERED_READS = Histogram("roster_gathered_reads", "Lookups that shared one statement.", buckets=GATHERED)

# Always 0 without ROSTER_REPLICA_URL. service/db/replica.py has the reasons.
FALLBACKS = ("above", "behind", "busy", "cluster", "conflict", "down", "failed", "slow", "timeline")
READS = Counter("roster_reads_total", "Reads, by the server that answered.", ("source",))
REPLICA_WAITS = Counter(
    "roster_replica_waits_total", "Reads that waited for a replica to replay their token.", ("outcome",)
)
REPLICA_FALLBACKS = Counter(
    "roster_replica_fallbacks_total",
    "Reads that a replica could have answered, but the primary did.",
    ("reason",),
)
READS_ON_PRIMARY, READS_ON_REPLICA = READS.labels("primary"), READS.labels("replica")
for outcome in ("behind", "caught up"):
    REPLICA_WAITS.labels(outcome)
for reason in FALLBACKS:
    REPLICA_FALLBACKS.labels(reason)
REPLICA_LAG_BYTES = Gauge(
    "roster_replica_lag_bytes", "Log that a replica has not replayed.", multiprocess_mode="livemax"
)
REPLICA_LAG = Gauge(
    "roster_replica_lag_seconds",
    "Time since a replica had replayed everything; it goes on while the replica is down.",
    multiprocess_mode="livemax",
)

WATCHERS = _level("roster_watchers", "Open watches of the change feed.")
WATCH_LAG = Gauge(
    "roster_watch_lag_seconds",
    "Time since the watch that is furthest behind had all changes.",
    multiprocess_mode="livemax",
)
CHANGES_SENT = Counter("roster_changes_sent_total", "Changes sent by the feed.", ("grpc_method",))
CHANGES_WATCHED, CHANGES_LISTED = map(CHANGES_SENT.labels, ("WatchChanges", "ListChanges"))

HASHING = _level("roster_password_hashes_pending", "Passwords being hashed, or waiting to be.")
HASHING_REFUSED = Counter(
    "roster_password_hashes_refused_total",
    "Password hashes refused because too many of the same caller were waiting.",
)
HASHES_UNREADABLE = Counter(
    "roster_password_hashes_unreadable_total", "Password checks of users whose stored hash can't be checked."
)


def serve(settings: Settings, registry: CollectorRegistry = REGISTRY) -> tuple[str, Callable[[], None]]:
    """Serve a registry over HTTP; return the address, "" for none, and a function that stops the server.

    Raises OSError if an address that was set can't be used. The default address may be in use by another
    server; then a warning is logged.
    """
    if not settings.metrics_listen:
        return "", lambda: None
    host, _, port = settings.metrics_listen.rpartition(":")
    try:
        server = ScrapeServer(host.strip("[]"), int(port), registry)
    except OSError as error:
        message = (
            f"can't serve metrics on {settings.metrics_listen}: {error.strerror}; "
            "set ROSTER_METRICS_LISTEN to another address, or to nothing"
        )
        if "metrics_listen" in settings.model_fields_set:
            raise OSError(message) from None
        log.warning(message)
        return "", lambda: None
    return f"{host}:{server.port}", server.close


def sum_workers(folder: str, pids: Callable[[], Iterable[int]]) -> CollectorRegistry:
    """Return a registry that sums the metrics of all workers; `pids` returns those that are running.

    When a worker has ended, `prometheus_client.multiprocess.mark_process_dead` removes its gauges.
    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    registry.register(_Processes(pids))
    return registry


class _Processes(Collector):
    """Process metrics, summed over several processes."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for pid in self._pids():
            for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                known = families.setdefault(family.name, family)
                if known is not family and "start_time" not in family.name:
                    known.samples = [
                        old._replace(value=old.value + new.value)
                        for old, new in zip(known.samples, family.samples, strict=True)
                    ]
        if cpu := families.get("process_cpu_seconds"):  # a counter must not fall when a worker ends
            ended = sum(sum(getrusage(whose)[:2]) for whose in (RUSAGE_SELF, RUSAGE_CHILDREN))
            cpu.samples = [sample._replace(value=sample.value + ended) for sample in cpu.samples]
        return families.values()
