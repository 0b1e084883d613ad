"""The server on one page: the services, the interceptors in order, start, drain, stop."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from roster.v1 import bulk_pb2, bulk_pb2_grpc, posts_pb2, posts_pb2_grpc, users_pb2, users_pb2_grpc
from service import metrics
from service.auth.policy import REFLECTION, Policy
from service.auth.reloading import ReloadingFile
from service.auth.tls import server_credentials
from service.auth.tokens import Tokens
from service.bulk.streams import BulkStreams
from service.connections import MAX_HEALTH_CONNECTIONS, connection_options, max_connections
from service.db.engine import Database
from service.db.reads import Reader
from service.errors import RosterError
from service.health import Health
from service.idempotency import delete_expired_requests
from service.interceptors.audit import Audit
from service.interceptors.auth import Auth
from service.interceptors.drain import Drain
from service.interceptors.errors import Errors
from service.interceptors.limits import Limits
from service.interceptors.logs import Logs
from service.interceptors.messages import Messages, Unread
from service.interceptors.metrics import Metrics
from service.loads.repository import expire_loads
from service.loads.servicer import BulkServicer
from service.memory import trim_forever
from service.posts.repository import PostRepository
from service.posts.servicer import PostServicer
from service.reflection import add_reflection
from service.settings import Settings
from service.users.model import User
from service.users.passwords import Passwords
from service.users.repository import UserRepository
from service.users.servicer import UserServicer

if TYPE_CHECKING:
    from service.interceptors.tracing import Tracing

log = logging.getLogger(__name__)

Clock = Callable[[], datetime]

# A bulk message has at most 4 MiB. One that is larger by a row should reach the servicer, which says what
# is right; gRPC refuses others by the length that they announce.
MAX_RECEIVED_BYTES = 5 << 20
MAX_PROBE_BYTES = 4 << 10
FORGET_EVERY_SECONDS = 600
QUIET_SECONDS = 2  # for answers that are on their way
LOOK_UP_SECONDS = 0.5  # for clients that look up what they were told last
CUT_OFF_SECONDS = 2  # of the grace, for calls that are cut off to say so and to roll back

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    # Calls on one connection. gRPC counts a call until its handler is gone, which is after the client has its
    # answer, and refuses a client that keeps to the limit (REFUSED_STREAM, UNAVAILABLE without details): with
    # 128 calls allowed and 128 in flight 58 % of 6,000 calls. A caller may have 500 in flight; twice as many
    # leaves room for those answered. More would let one connection's resets delay the others for longer.
    ("grpc.max_concurrent_streams", 1024),
    # Calls that no handler has taken yet. By default gRPC cancels some of them above 1,000 (CANCELLED without
    # details) before ROSTER_MAX_CALLS can refuse them with a reason, also those of callers who sent few.
    ("grpc.server.max_pending_requests", 8_000),
    ("grpc.server.max_pending_requests_hard_limit", 16_000),
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
    """Roster's gRPC server; `address` is where it listens, once started.

    Raises OSError for a certificate, a key or a policy that can't be used.
    """

    def __init__(self, settings: Settings, clock: Clock = utc_now) -> None:
        self.settings = settings
        self.clock = clock
        auth = authentication(settings, clock)
        self.credentials = server_credentials(settings)
        self.database = Database(settings)
        self.users = Reader(self.database, UserRepository, by=(User.id, User.email))
        self.posts = Reader(self.database, PostRepository)
        self.passwords = Passwords(settings)
        self.drain = Drain()
        # By default a second server takes the same port in silence.
        shared = [*OPTIONS, ("grpc.so_reuseport", int(settings.workers > 1))]
        options = [*shared, *connection_options(settings, max_connections(settings))]
        health_options = [*shared, *connection_options(settings, MAX_HEALTH_CONNECTIONS)]
        # Those that watch are outside of Errors, which gives a call its code.
        self.tracing = _tracing(settings.otlp_protocol)
        watching = [*self.tracing, Logs(settings.slow_call), Metrics()]
        self.messages = Messages()
        guarding = [Errors(), self.drain, auth, Limits(settings), self.messages, Audit()]
        self.server = grpc.aio.server(interceptors=[Unread(), *watching, *guarding], options=options)
        self.health_server = grpc.aio.server(
            interceptors=[Unread(), Errors(), Messages()],
            options=[*health_options, ("grpc.max_receive_message_length", MAX_PROBE_BYTES)],
        )
        services = [
            users_pb2.DESCRIPTOR.services_by_name["UserService"].full_name,
            posts_pb2.DESCRIPTOR.services_by_name["PostService"].full_name,
            bulk_pb2.DESCRIPTOR.services_by_name["BulkService"].full_name,
        ]
        self.bulk = BulkStreams(self.database)
        self.health = Health(self.database, services)
        self._add_services([*services, "grpc.health.v1.Health"])
        self.address = self.health_address = self.metrics_address = ""
        self._close_metrics: Callable[[], None] = lambda: None
        self._chores: list[asyncio.Task[None]] = []

    def _add_services(self, names: list[str]) -> None:
        users = UserServicer(self.database, self.users, self.passwords, self.bulk)
        users_pb2_grpc.add_UserServiceServicer_to_server(users, self.server)
        posts = PostServicer(self.database, self.posts, self.bulk)
        posts_pb2_grpc.add_PostServiceServicer_to_server(posts, self.server)
        loads = BulkServicer(self.database, self.settings.bulk_load_ttl)
        bulk_pb2_grpc.add_BulkServiceServicer_to_server(loads, self.server)
        for server in (self.server, self.health_server):
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if self.settings.reflection:
            add_reflection(self.server, names)

    async def start(self) -> None:
        """Listen; raises OSError where the address can't be had."""
        self.address = _bind(self.server, self.settings.listen, "ROSTER_LISTEN", self.credentials)
        if self.settings.health_listen:
            self.health_address = _bind(
                self.health_server, self.settings.health_listen, "ROSTER_HEALTH_LISTEN"
            )
        self.metrics_address, self._close_metrics = metrics.serve(self.settings)
        await self.health.start()
        await self.health_server.start()
        await self.server.start()
        self._chores = [asyncio.create_task(self._forget()), asyncio.create_task(trim_forever())]

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, let those in flight end, and close the database, in `grace` seconds at most.

        Load balancers are told first, and have a pause to notice. Bulk streams end behind what they have in
        hand; other calls go on until they are cut off, and told to try again.
        """
        loop = asyncio.get_running_loop()
        grace = self.settings.grace if grace is None else grace
        end = loop.time() + grace
        await self.health.enter_graceful_shutdown()
        await asyncio.sleep(min(self.settings.drain_pause, grace))
        await self.health.stop()
        stopped = asyncio.create_task(self.server.stop(max(end - loop.time(), CUT_OFF_SECONDS)))
        self.messages.drain()
        self.bulk.drain()
        await self.drain.wait(end - CUT_OFF_SECONDS - loop.time(), besides=REFLECTION)
        # grpcurl has a stream of reflection for as long as its own input lasts, and looks up errors by it.
        await self.drain.wait(min(LOOK_UP_SECONDS, end - CUT_OFF_SECONDS - loop.time()))
        self.drain.cut_off(REFLECTION)
        await self._ended(stopped, end - CUT_OFF_SECONDS)
        if self.drain.is_busy:
            self.drain.cut_off()
            await self._ended(stopped, loop.time() + CUT_OFF_SECONDS)
        await self.server.stop(None)
        await stopped
        for chore in self._chores:
            chore.cancel()
            await asyncio.wait([chore], timeout=CUT_OFF_SECONDS)  # it may be in the middle of a commit
        await self.health_server.stop(1)  # its watches are ending
        await asyncio.to_thread(self._close_metrics)
        self.passwords.close()
        await self.users.close()
        await self.posts.close()
        await self.database.close()
        for tracing in self.tracing:
            closing = threading.Thread(target=tracing.close, daemon=True)  # a collector may never answer
            closing.start()
            await asyncio.to_thread(closing.join, CUT_OFF_SECONDS)

    async def _ended(self, stopped: asyncio.Task[None], end: float) -> None:
        """Wait until gRPC and all calls have ended, till `end` at most.

        gRPC also waits for calls that have sent no message, and for some that it never hands on. When for a
        moment there are no others, their clients hear sooner than at their deadline that they may try again.
        """
        loop = asyncio.get_running_loop()
        while not stopped.done() and loop.time() < end:
            await self.drain.wait(end - loop.time())
            await asyncio.wait([stopped], timeout=min(QUIET_SECONDS, max(end - loop.time(), 0)))
            if not self.drain.is_busy:
                return

    async def _forget(self) -> None:
        """Drop, now and then, the answers and outcomes that were kept long enough."""
        while True:
            try:
                async with self.database.begin() as session:
                    await delete_expired_requests(session, self.clock())
                    await expire_loads(session, self.clock() - self.settings.bulk_load_ttl)
            except RosterError as error:
                log.warning("what has expired was not deleted: %s", error.message)
            await asyncio.sleep(FORGET_EVERY_SECONDS)


def authentication(settings: Settings, clock: Clock = utc_now) -> Auth:
    """Return the interceptor that knows callers and their rights; raises OSError for files it can't use."""
    tokens = None
    if settings.jwt_issuer and settings.jwt_audience and settings.jwt_keys_file:
        tokens = Tokens(settings.jwt_issuer, settings.jwt_audience, settings.jwt_keys_file, clock)
    policy = ReloadingFile(Policy.read, settings.policy_file) if settings.policy_file else None
    return Auth(policy, tokens)


def _tracing(protocol: str | None) -> "list[Tracing]":
    """Return the interceptor that makes traces, where OpenTelemetry is installed and has an endpoint."""
    if protocol is None:
        return []
    try:
        from service.interceptors.tracing import Tracing, exporting  # noqa: PLC0415
    except ImportError as error:
        log.warning("no traces, though there is an endpoint: %s; install the extra `tracing`", error)
        return []
    return [Tracing(exporting(protocol))]


def _bind(
    server: grpc.aio.Server, listen: str, setting: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Return the address where the server is going to listen; raises OSError where it can't be had."""
    _require_unused(listen)
    try:
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(
            f"can't listen on {listen}; is another server there already? {setting} names another address"
        ) from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _require_unused(listen: str) -> None:
    """Raise OSError for a Unix socket that is in use, which gRPC would take over, or that has no folder."""
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        if not path.parent.is_dir():
            raise OSError(f"can't listen on {listen}: there is no folder {path.parent}; make it first")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(f"can't listen on {listen}; another server is there already")
