"""A pool that tells the metrics its size, its use and who waits."""

import logging
from typing import Any

from prometheus_client import Gauge
from sqlalchemy import AsyncAdaptedQueuePool, PoolProxiedConnection, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from service.metrics import POOL_IN_USE, POOL_SIZE, POOL_TIMEOUTS, POOL_WAITING

logging.getLogger(__name__).setLevel(logging.WARNING)  # what SQLAlchemy says of a pool is for debugging


class MeasuredPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool; its `logging_name` is its name in the metrics."""

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
    """Keep the levels of an engine's pool up to date; what has not happened is told as 0."""
    POOL_WAITING.labels(name), POOL_TIMEOUTS.labels(name)
    size, in_use = POOL_SIZE.labels(name), POOL_IN_USE.labels(name)
    for happening, level, change in (
        ("connect", size, 1),
        ("close", size, -1),
        ("checkout", in_use, 1),
        ("checkin", in_use, -1),
    ):
        event.listen(engine.sync_engine, happening, _changing(level, change))


def _changing(level: Gauge, change: int) -> Any:
    return lambda *_: level.inc(change)
