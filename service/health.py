"""Health: ready where the database answers, apart from alive, which the process is as long as it answers."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckResponse, HealthListResponse

from service.db.engine import Database
from service.errors import PoolExhausted, QuotaExceeded, RosterError, ServiceNotFound
from service.interceptors.chain import host_of
from service.metrics import READY
from service.waits import BoundedWaits

log = logging.getLogger(__name__)

LIVENESS = "live"
INTERVAL_SECONDS = 2
# One failed query may be a failover's blink; two in a row are an outage.
FAILURES_TO_TELL = 2
# Watches have no end of their own, and would hold up a stop for all its grace. NOT_SERVING goes out first.
WATCHES_END_SECONDS = 0.1
# A watch takes 30 KiB, and anybody can open one.
MAX_WATCHES = 1000
MAX_CONNECTION_WATCHES = 16
SURPLUS = f"health has more than {MAX_WATCHES:,} watches, and most of them from this address"


class Health(aio.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1.Health for "" and every service: SERVING while the database answers a query.

    The service `live` is SERVING until the process stops.
    """

    def __init__(self, database: Database, services: Sequence[str]) -> None:
        super().__init__()
        self._database = database
        self._services = ["", *services]
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._watches: set[asyncio.Timeout] = set()
        self._connections: Counter[str] = Counter()  # watches by connection
        self._bounds = BoundedWaits(SURPLUS, MAX_WATCHES)
        self._changed = asyncio.Event()  # set, and replaced, with every change

    async def start(self) -> None:
        """Look at the database once, then every two seconds."""
        await self.set(LIVENESS, HealthCheckResponse.SERVING)
        await self.look()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Answer NOT_SERVING from now on, and end all watches."""
        await self.enter_graceful_shutdown()
        end = asyncio.get_running_loop().time() + WATCHES_END_SECONDS
        for watch in self._watches:
            watch.reschedule(end)

    async def enter_graceful_shutdown(self) -> None:
        """Answer NOT_SERVING from now on; the process is alive as long as it answers."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        READY.set(0)
        for service in self._services:
            await self.set(service, HealthCheckResponse.NOT_SERVING)

    async def look(self) -> None:
        """Ask the database once, and tell what it means."""
        try:
            async with asyncio.timeout(INTERVAL_SECONDS):
                await self._database.ping()
            self._failures = 0
        except PoolExhausted:
            pass  # busy is not away; taking a busy server out makes the others busier
        except (RosterError, TimeoutError):
            self._failures += 1
        serving = self._failures < FAILURES_TO_TELL
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        READY.set(serving)
        for service in self._services:
            await self.set(service, status)

    async def List(self, request: Any, context: Any) -> HealthListResponse:  # noqa: ARG002
        statuses = {name: HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return HealthListResponse(statuses=statuses)

    async def set(self, service: str, status: int) -> None:
        """Tell a status from now on."""
        await super().set(service, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:
        # The library's own writes while it holds a lock: one client that does not read would stop all. It
        # also keeps every name that anybody asks for.
        if request.service not in self._server_status:
            await context.write(HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN))
            raise ServiceNotFound("health knows no service of this name, and none is added while it runs")
        connection = context.peer()
        if self._connections[connection] >= MAX_CONNECTION_WATCHES:
            raise QuotaExceeded(f"a connection has at most {MAX_CONNECTION_WATCHES} watches")
        self._connections[connection] += 1
        try:
            await self._bounds.bound(
                self._watch_until_stop(request.service, context), partial(host_of, context)
            )
        finally:
            self._connections[connection] -= 1
            if not self._connections[connection]:
                del self._connections[connection]

    async def _watch_until_stop(self, service: str, context: Any) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as watch:
                self._watches.add(watch)
                try:
                    await self._report(service, context)
                finally:
                    self._watches.discard(watch)

    async def _report(self, service: str, context: Any) -> None:
        """Write the status of a service now, and whenever it changes."""
        reported = None
        while True:
            changed = self._changed
            status = self._server_status[service]
            if status != reported:
                await context.write(HealthCheckResponse(status=status))
                reported = status
            await changed.wait()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            try:
                await self.look()
            except Exception:
                log.exception("the health check itself failed")
