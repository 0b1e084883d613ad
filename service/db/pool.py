"""A connection pool with metrics: its size, connections in use, and waiting calls."""

import logging
from collections.abc import Callable

from prometheus_client import Gauge
from sqlalchemy import AsyncAdaptedQueuePool, PoolProxiedConnection, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from service.metrics import POOL_IN_USE, POOL_SIZE, POOL_TIMEOUTS, POOL_WAITING

logging.getLogger(__name__).setLevel(logging.WARNING)  # the lower levels are for debugging SQLAlchemy


class InstrumentedPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool, with metrics labelled by its `logging_name`."""

    def connect(self) -> PoolProxiedConnection:
        """Wait for a connection; raises SQLAlchemy's TimeoutError."""
        waiting = POOL_WAITING.labels(self.logging_name)
        waiting.inc()
        try:
            return super().connect()
        except PoolTimeoutError:
            POOL_TIMEOUTS.labels(self.logging_name).inc()
            raise
        finally:
            waiting.dec()


def measure_pool(engine: AsyncEngine, name: str) -> None:
    """Keep the gauges of an engine's pool up to date, and export counters that are still 0."""
    POOL_WAITING.labels(name), POOL_TIMEOUTS.labels(name)
    size, in_use = POOL_SIZE.labels(name), POOL_IN_USE.labels(name)
    for name_of_event, gauge, change in (
        ("connect", size, 1),
        ("close", size, -1),
        ("checkout", in_use, 1),
        ("checkin", in_use, -1),
    ):
        event.listen(engine.sync_engine, name_of_event, _listener(gauge, change))


def _listener(gauge: Gauge, change: int) -> Callable[..., None]:
    return lambda *_: gauge.inc(change)
