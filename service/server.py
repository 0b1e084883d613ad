"""The server on one page: services, interceptors in order, start, drain, stop."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from errno import EADDRINUSE
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from roster.errors import RosterError
from service import metrics, telemetry
from service.auth.policy import Policy
from service.auth.reloading import ReloadingFile
from service.auth.tls import server_credentials
from service.bulk.stream import BulkStreams
from service.changes.export import Exports
from service.changes.feed import Feed
from service.changes.prune import prune_changes
from service.changes.servicer import ChangeServicer
from service.changes.watcher import Watches
from service.connections import MAX_HEALTH_CONNECTIONS, connection_options, max_connections
from service.db.engine import Database
from service.db.reads import Reader
from service.db.token_keys import delete_old_token_keys
from service.health import Health
from service.heartbeat import Heartbeat
from service.idempotency import delete_expired_requests
from service.interceptors.audit import audit_writes
from service.interceptors.auth import Auth
from service.interceptors.chain import Chain
from service.interceptors.consistency import Consistency
from service.interceptors.drain import Drain
from service.interceptors.errors import answer_errors
from service.interceptors.limits import Limits
from service.interceptors.messages import Messages
from service.interceptors.observe import observe_calls
from service.loads.repository import expire_loads
from service.loads.servicer import BulkServicer
from service.memory import trim_forever
from service.posts.repository import PostRepository
from service.posts.servicer import PostServicer
from service.reflection import add_reflection
from service.scrapes import listen_on
from service.services import SERVICE_NAMES, add_servicer
from service.settings import Settings
from service.users.model import User
from service.users.passwords import Passwords
from service.users.repository import UserRepository
from service.users.servicer import UserServicer
from service.variables import environment

if TYPE_CHECKING:
    from service.interceptors.tracing import Tracing

log = logging.getLogger(__name__)

Clock = Callable[[], datetime]

# A bulk message has at most 4 MiB. A message that exceeds this by one row should reach the servicer, whose
# error says what to do. gRPC refuses still larger ones before it reads them.
MAX_RECEIVED_BYTES = 5 << 20
MAX_PROBE_BYTES = 4 << 10
EXPIRY_INTERVAL_SECONDS = 600
QUIET_SECONDS = 2  # without a call in flight, while the last responses are being sent
CUT_OFF_SECONDS = 2  # the end of the grace, in which cancelled calls roll back and return a status

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    # Calls on one connection. gRPC counts a call until its handler has returned, which is after the client
    # has the response. So it refuses calls of a client that keeps to the limit (REFUSED_STREAM, UNAVAILABLE
    # without details): 58 % of 6,000 calls, with a limit of 128 and 128 calls in flight. A caller may have
    # 500 calls in flight; twice as many leaves room for answered ones. With a higher limit, the resets of one
    # connection could delay the others for longer.
    ("grpc.max_concurrent_streams", 1024),
    # Calls that wait for a handler. By default gRPC cancels some of them above 1,000 (CANCELLED without
    # details), also those of callers who sent few, before ROSTER_MAX_CALLS can refuse them with a reason.
    ("grpc.server.max_pending_requests", 8_000),
    ("grpc.server.max_pending_requests_hard_limit", 16_000),
    # Clients may ping every 10 s, also between calls: the shortest interval of grpc-go and grpc-java, which
    # grpc-go's example uses. Half of it leaves room for pings that arrive late. A client that pings faster
    # gets `too_many_pings` after two strikes. Half-open clients are found in 80 s instead of 2 h.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def utc_now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


class Server:
    """Roster's gRPC server; `address` is where it listens once it is started.

    Raises OSError for a certificate, a key or a policy that can't be used.
    """

    def __init__(self, settings: Settings, clock: Clock = utc_now) -> None:
        self.settings = settings
        self.clock = clock
        auth = authentication(settings, clock)
        self.credentials = server_credentials(settings)
        self.database = Database(settings)
        self.replica = self.database.replica
        self.users = Reader(self.database, UserRepository, by=(User.id, User.email))
        self.posts = Reader(self.database, PostRepository)
        self.passwords = Passwords(settings)
        self.drain = Drain()
        # With gRPC's default a second server would silently share the port.
        shared = [*OPTIONS, ("grpc.so_reuseport", int(settings.workers > 1))]
        options = [*shared, *connection_options(settings, max_connections(settings))]
        health_options = [*shared, *connection_options(settings, MAX_HEALTH_CONNECTIONS)]
        self.tracing = _tracing()
        self.messages = Messages()
        self.handlers = Chain(
            # These observe calls, from outside of `answer_errors`, which gives a call its code.
            *(tracing.intercept for tracing in self.tracing),
            observe_calls(settings.slow_call),
            # These can refuse a call, each before the next does any work for it.
            answer_errors,
            self.drain.intercept,
            auth.intercept,
            Limits(settings).intercept,
            self.messages.intercept,
            *((Consistency(self.replica.primary).intercept,) if self.replica else ()),
            audit_writes,
        )
        self.server = grpc.aio.server(handlers=[self.handlers], options=options)
        self.health_handlers = Chain(answer_errors, Messages().intercept)
        self.health_server = grpc.aio.server(
            handlers=[self.health_handlers],
            options=[*health_options, ("grpc.max_receive_message_length", MAX_PROBE_BYTES)],
        )
        self.bulk = BulkStreams(self.database)
        self.feed = Feed(self.database)
        self.watches = Watches(self.feed)
        self.exports = Exports(self.database, self.feed)
        self.health = Health(self.database, SERVICE_NAMES)
        self.heartbeat = Heartbeat(self.database)
        self._add_services()
        self.address = self.health_address = self.metrics_address = ""
        self._close_metrics: Callable[[], None] = lambda: None
        self._chores: list[asyncio.Task[None]] = []

    def _add_services(self) -> None:
        for servicer in (
            UserServicer(self.database, self.users, self.passwords, self.bulk, self.exports),
            PostServicer(self.database, self.posts, self.bulk, self.exports),
            BulkServicer(self.database, self.settings.bulk_load_ttl),
            ChangeServicer(self.feed, self.watches),
        ):
            add_servicer(servicer, self.handlers)
        for handlers in (self.handlers, self.health_handlers):
            health_pb2_grpc.add_HealthServicer_to_server(self.health, handlers)
        if self.settings.reflection:
            add_reflection(self.handlers, [*SERVICE_NAMES, "grpc.health.v1.Health"])

    async def start(self) -> None:
        """Start serving; raises OSError if it can't listen on an address."""
        listen, health_listen = self.settings.listen, self.settings.health_listen
        # Several workers share the ports, which their supervisor has reserved.
        if self.settings.workers == 1:
            _require_unused(listen, "ROSTER_LISTEN")
            _require_unused(health_listen, "ROSTER_HEALTH_LISTEN")
        self.address = _bind(self.server, listen, "ROSTER_LISTEN", self.credentials)
        if health_listen:
            self.health_address = _bind(self.health_server, health_listen, "ROSTER_HEALTH_LISTEN")
        self.metrics_address, self._close_metrics = metrics.serve(self.settings)
        await self.health.start()
        if self.replica:
            await self.replica.probe()
        await self.health_server.start()
        await self.server.start()
        chores = [
            self._delete_expired(),
            trim_forever(),
            self.heartbeat.beat_forever(),
            self.database.watch_forever(),
        ]
        if self.replica:
            chores.append(self.replica.watch_forever())
        self._chores = [*map(asyncio.create_task, chores)]

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, finish those in flight, and close the database, within `grace` seconds.

        Health says NOT_SERVING first, so that load balancers have `drain_pause` to notice. Bulk streams
        finish the batches already received; other calls go on until they are cut off with a retryable error.
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
        self.watches.drain()
        await self._wait_for_calls(stopped, end - CUT_OFF_SECONDS)
        if self.drain.is_busy:
            self.drain.cut_off()
            await self._wait_for_calls(stopped, loop.time() + CUT_OFF_SECONDS)
        await self.server.stop(None)
        await stopped
        for chore in self._chores:
            chore.cancel()
            await asyncio.wait([chore], timeout=CUT_OFF_SECONDS)  # it may be committing
        if self._chores:
            await self.heartbeat.stop()
        await self.health_server.stop(1)  # its watches are already ending
        await asyncio.to_thread(self._close_metrics)
        self.passwords.close()
        await self.users.close()
        await self.posts.close()
        await self.database.close()
        for tracing in self.tracing:
            closing = threading.Thread(target=tracing.close, daemon=True)  # the collector may not answer
            closing.start()
            await asyncio.to_thread(closing.join, CUT_OFF_SECONDS)

    async def _wait_for_calls(self, stopped: asyncio.Task[None], end: float) -> None:
        """Wait until gRPC has stopped and all calls have ended, at most until `end`.

        gRPC also waits for streams of reflection, for calls that have sent no message, and for some that it
        never passes to a handler. So the wait ends once no other call has been in flight for a moment. Then
        the clients of those calls learn before their deadline that they can try again.
        """
        loop = asyncio.get_running_loop()
        while not stopped.done() and loop.time() < end:
            await self.drain.wait(end - loop.time())
            await asyncio.wait([stopped], timeout=min(QUIET_SECONDS, max(end - loop.time(), 0)))
            if not self.drain.is_busy:
                return

    async def _delete_expired(self) -> None:
        """Delete expired responses, loads, keys of page tokens and changes every ten minutes."""
        while True:
            try:
                async with self.database.begin() as session:
                    await delete_expired_requests(session, self.clock())
                    await expire_loads(session, self.clock() - self.settings.bulk_load_ttl)
                    await delete_old_token_keys(session, self.clock().date())
                await prune_changes(self.database, self.clock() - self.settings.changes_ttl)
            except RosterError as error:
                log.warning("expired rows were not deleted: %s", error.message)
            except Exception:  # such as a right that the role lacks; it may be granted
                log.exception("expired rows were not deleted")
            await asyncio.sleep(EXPIRY_INTERVAL_SECONDS)


def authentication(settings: Settings, clock: Clock = utc_now) -> Auth:
    """Return the interceptor for authentication; raises OSError for files that can't be used."""
    tokens = None
    if settings.jwt_issuer and settings.jwt_audience and settings.jwt_keys_file:
        from service.auth.tokens import Tokens  # noqa: PLC0415  (it imports cryptography, which takes 8 MiB)

        tokens = Tokens(settings.jwt_issuer, settings.jwt_audience, settings.jwt_keys_file, clock)
    policy = ReloadingFile(Policy.read, settings.policy_file) if settings.policy_file else None
    return Auth(policy, tokens)


def _tracing() -> "list[Tracing]":
    """Return the interceptor for traces, if OpenTelemetry is installed and has an endpoint.

    Without traces the server works as well, so whatever is wrong with their configuration is only logged.
    """
    if not telemetry.is_wanted(environment()):
        return []
    try:
        telemetry.check(environment())
        from service.interceptors.tracing import Tracing, exporting_provider  # noqa: PLC0415

        return [Tracing(exporting_provider(telemetry.protocol(environment())))]
    except ImportError as error:
        log.warning("traces can't be sent to the configured endpoint: %s; install the extra `tracing`", error)
    except Exception as error:  # noqa: BLE001 - OpenTelemetry reads its variables when it is imported
        log.warning("traces are not sent: %s; correct the OTEL_ variables", error)
    return []


def _bind(
    server: grpc.aio.Server, listen: str, setting: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Bind a server to an address and return it, with its port; raises OSError if that fails."""
    try:
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(_in_use(listen, setting)) from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _in_use(listen: str, setting: str) -> str:
    return f"can't listen on {listen}; is another server listening there? {setting} sets the address"


def _require_unused(listen: str, setting: str) -> None:
    """Raise OSError for an address that can't be used, about which gRPC would log a line of its own.

    It would take over a Unix socket that is in use.
    """
    if listen.startswith("unix:"):
        _require_unused_socket(listen)
        return
    host, _, port = listen.rpartition(":")
    try:
        if port:
            listen_on(host.strip("[]"), int(port)).close()
    except socket.gaierror as error:
        raise OSError(f"can't listen on {listen}: {error.strerror}; {setting} sets the address") from None
    except OSError as error:
        if error.errno == EADDRINUSE:  # otherwise gRPC may find another address of the host
            raise OSError(_in_use(listen, setting)) from None


def _require_unused_socket(listen: str) -> None:
    """Raise OSError if a Unix socket is in use, or if its folder is missing."""
    path = Path(listen.removeprefix("unix:"))
    if not path.parent.is_dir():
        raise OSError(f"can't listen on {listen}: the folder {path.parent} does not exist; create it first")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError(f"can't listen on {listen}; another server is listening there")
