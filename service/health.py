"""Health checks: readiness follows the database, liveness only the process."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from roster.errors import PoolExhausted, QuotaExceeded, RosterError, ServiceNotFound
from service.db.engine import Database
from service.interceptors.chain import Context, host_of
from service.metrics import READY
from service.waits import BoundedWaits

log = logging.getLogger(__name__)

LIVENESS = "live"
INTERVAL_SECONDS = 2
# One failed query can be a short failover; two in a row are an outage.
FAILURES_BEFORE_NOT_SERVING = 2
# Watches don't end by themselves and would delay a stop for its whole grace. After NOT_SERVING they get this
# long to receive it.
WATCHES_END_SECONDS = 0.1
# A watch takes 30 KiB, and anybody can open one.
MAX_WATCHES = 1000
MAX_CONNECTION_WATCHES = 16
TOO_MANY = f"there are more than {MAX_WATCHES:,} health watches, most of them from this address"


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
        self._watches_by_connection: Counter[str] = Counter()
        self._bounds = BoundedWaits(TOO_MANY, MAX_WATCHES)
        self._changed = asyncio.Event()  # set and replaced by every change

    async def start(self) -> None:
        """Check the database once, then every two seconds."""
        await self.set(LIVENESS, HealthCheckResponse.SERVING)
        await self.check_database()
        self._task = asyncio.create_task(self._check_forever())

    async def stop(self) -> None:
        """Answer NOT_SERVING from now on, and end all watches."""
        await self.enter_graceful_shutdown()
        end = asyncio.get_running_loop().time() + WATCHES_END_SECONDS
        for watch in self._watches:
            watch.reschedule(end)

    async def enter_graceful_shutdown(self) -> None:
        """Answer NOT_SERVING from now on; `live` stays SERVING."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        READY.set(0)
        for service in self._services:
            await self.set(service, HealthCheckResponse.NOT_SERVING)

    async def check_database(self) -> None:
        """Query the database once, and set the status of all services."""
        try:
            await self._ping()
            self._failures = 0
        except PoolExhausted:
            # The database is busy, not down; without this server the others would be busier.
            self._database.doubt()
        except (RosterError, TimeoutError) as error:
            if isinstance(error, TimeoutError):  # the others are logged already
                log.warning("the database did not answer the health check within %s s", INTERVAL_SECONDS)
            self._failures += 1
            self._database.doubt()
        serving = self._failures < FAILURES_BEFORE_NOT_SERVING
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        READY.set(serving)
        for service in self._services:
            await self.set(service, status)

    async def _ping(self) -> None:
        """Query the database; raises TimeoutError without waiting for the query to be cancelled."""
        ping = asyncio.ensure_future(self._database.ping())
        try:
            async with asyncio.timeout(INTERVAL_SECONDS):
                await asyncio.shield(ping)
        finally:
            ping.add_done_callback(_ignore)
            ping.cancel()

    async def List(self, request: HealthListRequest, context: Context) -> HealthListResponse:  # noqa: ARG002
        statuses = {name: HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return HealthListResponse(statuses=statuses)

    async def set(self, service: str, status: int) -> None:
        """Set the status of a service, and report it to its watches."""
        await super().set(service, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(self, request: HealthCheckRequest, context: Context) -> None:
        # The library's own Watch writes while it holds a lock: one client that does not read would block all
        # others. It also stores every name that a client asks for.
        if request.service not in self._server_status:
            await context.write(HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN))
            raise ServiceNotFound(
                "health has no service of this name, and none is added while the server runs"
            )
        connection = context.peer()
        if self._watches_by_connection[connection] >= MAX_CONNECTION_WATCHES:
            raise QuotaExceeded(f"a connection can have at most {MAX_CONNECTION_WATCHES} watches")
        self._watches_by_connection[connection] += 1
        try:
            await self._bounds.bound(
                self._watch_until_stop(request.service, context), partial(host_of, context)
            )
        finally:
            self._watches_by_connection[connection] -= 1
            if not self._watches_by_connection[connection]:
                del self._watches_by_connection[connection]

    async def _watch_until_stop(self, service: str, context: Context) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as watch:
                self._watches.add(watch)
                try:
                    await self._report(service, context)
                finally:
                    self._watches.discard(watch)

    async def _report(self, service: str, context: Context) -> None:
        """Write the status of a service now and after each change."""
        reported = None
        while True:
            changed = self._changed
            status = self._server_status[service]
            if status != reported:
                await context.write(HealthCheckResponse(status=status))
                reported = status
            await changed.wait()

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            try:
                await self.check_database()
            except Exception:
                log.exception("the health check itself failed")


def _ignore(ping: "asyncio.Future[None]") -> None:
    """Retrieve the error of a query that nobody waits for; otherwise asyncio would log it."""
    if not ping.cancelled():
        ping.exception()
