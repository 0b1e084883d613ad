"""The server on one page: the services, the interceptors in order, start, drain, stop."""

import asyncio
import logging
import socket
from collections.abc import Callable
from datetime import UTC, datetime

import grpc
from grpc_health.v1 import health_pb2_grpc

from roster.v1 import bulk_pb2, bulk_pb2_grpc, posts_pb2, posts_pb2_grpc, users_pb2, users_pb2_grpc
from service.bulk.servicer import BulkServicer
from service.bulk.streams import BulkStreams
from service.db.bulk.loads import expire_loads
from service.db.engine import Database
from service.db.requests import forget_requests
from service.errors import RosterError
from service.health import Health
from service.interceptors.drain import Drain
from service.interceptors.errors import Errors
from service.posts.reader import PostReader
from service.posts.servicer import PostServicer
from service.reflection import add_reflection
from service.settings import Settings
from service.users.passwords import Passwords
from service.users.reader import UserReader
from service.users.servicer import UserServicer

log = logging.getLogger(__name__)

Clock = Callable[[], datetime]

# A bulk message has 4 MiB at most; one that is a little larger should reach the servicer, which says
# what is right. Parsing can take 70 times the bytes in memory.
MAX_RECEIVED_BYTES = 8 << 20
FORGET_EVERY_SECONDS = 600
HANDLERS_END_SECONDS = 5

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    # By default a second server takes the same port in silence.
    ("grpc.so_reuseport", 0),
    # Clients ping every 30 s, also between calls; half-open ones are found in 80 s instead of 2 h.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


class Server:
    """Roster's gRPC server; `address` is where it listens, once started."""

    def __init__(self, settings: Settings, clock: Clock = utc_now) -> None:
        self.settings = settings
        self.clock = clock
        self.database = Database(settings)
        self.users = UserReader(self.database)
        self.posts = PostReader(self.database)
        self.passwords = Passwords(settings.password_workers, settings.password_queue)
        self.drain = Drain()
        self.server = grpc.aio.server(interceptors=[Errors(), self.drain], options=OPTIONS)
        services = [
            users_pb2.DESCRIPTOR.services_by_name["UserService"].full_name,
            posts_pb2.DESCRIPTOR.services_by_name["PostService"].full_name,
            bulk_pb2.DESCRIPTOR.services_by_name["BulkService"].full_name,
        ]
        self.health = Health(self.database, services)
        self._add_services([*services, "grpc.health.v1.Health"])
        self.address = ""
        self._forgetting: asyncio.Task[None] | None = None

    def _add_services(self, names: list[str]) -> None:
        bulk = BulkStreams(self.database)
        users = UserServicer(self.database, self.users, self.passwords, bulk)
        users_pb2_grpc.add_UserServiceServicer_to_server(users, self.server)
        posts = PostServicer(self.database, self.posts, bulk)
        posts_pb2_grpc.add_PostServiceServicer_to_server(posts, self.server)
        loads = BulkServicer(self.database, self.settings.bulk_load_ttl)
        bulk_pb2_grpc.add_BulkServiceServicer_to_server(loads, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        if self.settings.reflection:
            add_reflection(self.server, names)

    async def start(self) -> None:
        """Listen; raises OSError where the address can't be had."""
        listen = self.settings.listen
        _require_unused(listen)
        try:
            port = self.server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"can't listen on {listen}; is another server there already?") from error
        self.address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
        await self.health.start()
        await self.server.start()
        self._forgetting = asyncio.create_task(self._forget())

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, give those in flight `grace` seconds, then close the database."""
        if self._forgetting:
            self._forgetting.cancel()
            await asyncio.wait([self._forgetting])  # it may be amid a commit
        await self.health.stop()
        await self.server.stop(self.settings.grace if grace is None else grace)
        await self.drain.wait(HANDLERS_END_SECONDS)
        self.passwords.close()
        await self.users.close()
        await self.posts.close()
        await self.database.close()

    async def _forget(self) -> None:
        """Drop, now and then, the answers and outcomes that were kept long enough."""
        while True:
            try:
                async with self.database.begin() as session:
                    await forget_requests(session, self.clock())
                    await expire_loads(session, self.clock() - self.settings.bulk_load_ttl)
            except RosterError as error:
                log.warning("what has expired was not deleted: %s", error.message)
            await asyncio.sleep(FORGET_EVERY_SECONDS)


def _require_unused(listen: str) -> None:
    """Raise OSError for a Unix socket that is in use: gRPC would take it from the server there."""
    if listen.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(listen.removeprefix("unix:")) == 0:
                raise OSError(f"can't listen on {listen}; another server is there already")
