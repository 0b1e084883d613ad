"""Connects to PostgreSQL: to the first of several hosts that fits, with the parameters of libpq."""

import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlencode

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import conninfo
from service.db.durability import DurableConnection
from service.db.errors import NoUsableHost, short_cause
from service.db.search import Search
from service.variables import environment

# Larger than any batch, so that a COPY never blocks on a full buffer.
WRITE_BUFFER_BYTES = 8 << 20
# What asyncpg accepts as an argument, by the name that libpq has for it.
ARGUMENTS = {
    "user": "user",
    "password": "password",
    "dbname": "database",
    "passfile": "passfile",
    "krbsrvname": "krbsrvname",
    "gsslib": "gsslib",
}
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES
SOCKET_OPTIONS = {
    "keepalives_idle": "TCP_KEEPIDLE",
    "keepalives_interval": "TCP_KEEPINTVL",
    "keepalives_count": "TCP_KEEPCNT",
    "tcp_user_timeout": "TCP_USER_TIMEOUT",
}
ALPN = ["postgresql"]
# For a pooler in transaction mode: another session of PostgreSQL has no statement prepared in this one, or
# another one under its name. Without names, asyncpg sends Parse and Describe with a Flush. The pooler takes
# the session back only after the answer to a Sync, which comes with Parse, Bind and Execute. If asyncpg can't
# encode an argument in between, the ROLLBACK of the transaction ends with a Sync.
NO_PREPARED_STATEMENTS: dict[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}


class WrongHost(ConnectionError):
    """A server that `target_session_attrs` excludes; after a failover it may fit."""


ANSWERS = (WrongHost, asyncpg.CannotConnectNowError)
# Another host may do better. libpq also goes on if a server ends the connection during the login.
PASSING = (OSError, asyncpg.OperatorInterventionError, asyncpg.PostgresConnectionError)
Candidate = tuple[str | None, int | None, str]  # host, port, session attributes
Admit = Callable[[Any], Awaitable[None]]  # a new connection; raises an error if it can't be used


class Connection(DurableConnection):
    """A connection of asyncpg with settings for its whole life."""

    # asyncpg sets it last. Without it, the end of a connection that fails before prints a traceback.
    _source_traceback = None

    def abort(self) -> None:
        """Close the connection at once; a statement in flight fails as if the server had gone.

        `terminate` is for a connection that nobody uses: it removes what a statement in flight needs for its
        next message.
        """
        self._transport.abort()  # type: ignore[attr-defined]

    async def prepare_session(self, settings: Mapping[str, str], timeout: float | None) -> None:
        """Set settings by one message; raises ConnectionError if that takes longer than the timeout.

        They are not parameters of the startup message: PgBouncer refuses those in all modes.
        """
        try:
            if settings:
                await self.execute(_set_config(settings), timeout=timeout)
        except TimeoutError as error:
            self.terminate()
            raise ConnectionError("no answer in time") from error
        except BaseException:
            self.terminate()
            raise

    async def read(self, statement: str, *values: Any, record_class: type[asyncpg.Record]) -> Any:
        """Return the rows of a statement that is not part of a transaction."""
        return await self.fetch(statement, *values, record_class=record_class)


class PooledConnection(Connection):
    """A connection through a pooler that gives it a session of PostgreSQL for each transaction.

    No setting of a session lasts, so each transaction begins with its own, in the message of its BEGIN. A
    read needs a transaction too: without one, PostgreSQL would not end a read whose client has died.
    """

    _transaction_settings = ""

    async def prepare_session(self, settings: Mapping[str, str], timeout: float | None) -> None:  # noqa: ARG002
        """Keep the settings for each transaction."""
        self._transaction_settings = _set_config(settings, is_local=True)
        # See _introspect_types.
        self._server_caps = self._server_caps._replace(jit=False)  # type: ignore[has-type]

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Execute a command; a BEGIN also sets the settings of the transaction."""
        if not query.startswith("BEGIN"):
            return str(await super().execute(query, *args, timeout=timeout))
        try:
            return str(
                await super().execute(f"{query.rstrip(';')}; {self._transaction_settings}", timeout=timeout)
            )
        except BaseException as error:
            # The transaction may be open, or wait for a session in the pooler, which does not cancel that.
            self.terminate()
            if isinstance(error, TimeoutError):
                raise ConnectionError("the pooler had no session in time") from error
            raise

    async def _introspect_types(self, typeoids: Iterable[int], timeout: float | None) -> Any:
        # The planner's jit makes this slow. asyncpg would turn it off, and on again, for the session.
        await self.execute("SET LOCAL jit = off", timeout=timeout)
        return await super()._introspect_types(typeoids, timeout)  # type: ignore[misc]

    async def read(self, statement: str, *values: Any, record_class: type[asyncpg.Record]) -> Any:
        """Return the rows of a statement, in a transaction of its own; after an error that is still open."""
        await self.execute("BEGIN")
        rows = await self.fetch(statement, *values, record_class=record_class)
        await self.execute("COMMIT")
        return rows


def postgresql_engine(
    url: str | Mapping[str, str],
    *,
    timeout: float | None = None,
    application_name: str = "",
    settings: Mapping[str, str] | None = None,
    pools_transactions: bool = False,
    admit: Admit | None = None,
    connect_args: Mapping[str, Any] | None = None,
    defaults: Mapping[str, str] | None = None,
    **options: Any,
) -> AsyncEngine:
    """Return an engine for a connection string of PostgreSQL, or for the parameters of one.

    `timeout` is for a URL without `connect_timeout`, and `application_name` for one without a name. The
    `settings` override those of the URL. `pools_transactions` is for a pooler in transaction mode. The
    `defaults` are parameters for those that are neither in the URL nor in the environment. By default,
    several hosts are searched for the primary. Raises ValueError for a wrong connection string.
    """
    given = conninfo.read(url, environment()) if isinstance(url, str) else url
    parameters = {**(defaults or {}), **given}
    if len(conninfo.addresses(parameters)) > 1:
        parameters.setdefault("target_session_attrs", "primary")
    at_start = {"application_name": application_name} if application_name else {}
    at_start |= conninfo.startup_settings(parameters)
    caches = NO_PREPARED_STATEMENTS if pools_transactions else _caches(parameters)
    arguments = {
        "async_creator_fn": _creator(parameters, admit),
        "timeout": _timeout(parameters, timeout),
        "server_settings": at_start,
        "settings": {**conninfo.session_settings(parameters), **(settings or {})},
        "pools_transactions": pools_transactions,
        **caches,
        **(connect_args or {}),
    }
    return create_async_engine("postgresql+asyncpg://", connect_args=arguments, **options)


def _caches(parameters: Mapping[str, str]) -> dict[str, int]:
    return {name: int(parameters[name]) for name in conninfo.CACHES if name in parameters}


def _timeout(parameters: Mapping[str, str], default: float | None) -> float | None:
    """Return the time limit for each host in seconds; None, like 0 in libpq, is no limit."""
    if "connect_timeout" not in parameters:
        return default
    seconds = int(parameters["connect_timeout"])
    return seconds if seconds > 0 else None


def _creator(parameters: Mapping[str, str], admit: Admit | None) -> Any:
    async def create(**options: Any) -> Any:
        return await connect(parameters, admit=admit, **options)

    return create


async def connect(
    parameters: Mapping[str, str],
    *,
    settings: Mapping[str, str] | None = None,
    pools_transactions: bool = False,
    admit: Admit | None = None,
    **options: Any,
) -> Any:
    """Return a connection to the first host that answers and has the `target_session_attrs`.

    It has these settings for its whole life, or if the pooler `pools_transactions`, for each transaction.
    `admit` can raise WrongHost for a connection to a host that fits otherwise.

    Raises NoUsableHost if there is none, and asyncpg's error if a server refuses. As for libpq, each host has
    the whole timeout, and a refused login ends the search; but a silent host does not delay the next one.
    """
    errors: dict[str, BaseException] = {}  # by host; `prefer-standby` tries each twice
    kind = PooledConnection if pools_transactions else Connection
    attempt = partial(_prepared, parameters, settings or {}, admit, {**options, "connection_class": kind})
    for candidates in _candidates(parameters):
        search = Search(candidates, attempt, PASSING)
        if connection := await search.run():
            _set_socket_options(connection, parameters)
            # A COPY that is blocked on a full write buffer never notices a lost connection or a timeout.
            connection._transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)  # noqa: SLF001
            return connection
        errors |= {conninfo.host_name(host, port): error for (host, port, _), error in search.errors}
    *_, last = errors.values()
    if len(errors) == 1 and not isinstance(last, OSError):
        raise last
    was_reached = any(isinstance(error, ANSWERS) for error in errors.values())
    causes = "; ".join(f"{name}: {short_cause(error)}" for name, error in errors.items())
    raise NoUsableHost(causes, was_reached=was_reached) from last


def _candidates(parameters: Mapping[str, str]) -> Iterator[Sequence[Candidate]]:
    """Yield the hosts in the order in which to try them, with what each must be, all of one kind together."""
    places = conninfo.addresses(parameters)
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(places)
    wanted = parameters.get("target_session_attrs", "any")
    for attributes in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
        yield [(host, port, attributes) for host, port in places]


async def _prepared(
    parameters: Mapping[str, str],
    settings: Mapping[str, str],
    admit: Admit | None,
    options: Mapping[str, Any],
    candidate: Candidate,
) -> Any:
    """Return a connection with its settings, if it is admitted."""
    connection = await _connect(parameters, options, candidate)
    await connection.prepare_session(settings, options.get("timeout"))
    if admit:
        await admit(connection)
    return connection


async def _connect(parameters: Mapping[str, str], options: Mapping[str, Any], candidate: Candidate) -> Any:
    host, port, session_attributes = candidate
    arguments = {ours: parameters[name] for name, ours in ARGUMENTS.items() if name in parameters}
    try:
        # asyncpg accepts most TLS parameters only in a URL; the arguments override what a URL contains.
        return await asyncpg.connect(  # type: ignore[call-overload]  # the options are those of SQLAlchemy
            f"postgresql://?{urlencode(_tls_parameters(parameters))}",
            host=host,
            port=port,
            ssl=_system_tls(parameters),
            target_session_attrs=session_attributes,
            **arguments,
            **options,
        )
    except TimeoutError as error:  # of connecting, not of a statement: nothing was sent
        raise ConnectionError("no answer in time") from error
    except asyncpg.TargetServerAttributeNotMatched as error:
        raise WrongHost(f"the server is not {session_attributes}") from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        raise
    except Exception as error:  # an answer that asyncpg does not expect, such as one without a version
        raise ConnectionError("the server did not answer as PostgreSQL does") from error


def _set_config(settings: Mapping[str, str], *, is_local: bool = False) -> str:
    """Return SQL that sets settings; unlike SET, it reads a list such as a search path as `options` does."""
    calls = [
        f"set_config({_literal(name)}, {_literal(value)}, {str(is_local).lower()})"
        for name, value in settings.items()
    ]
    return f"SELECT {', '.join(calls)}"


def _literal(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace("'", "''")
    return f"E'{escaped}'"


def _tls_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
    return {name: parameters[name] for name in conninfo.TLS if name in parameters}


def _system_tls(parameters: Mapping[str, str]) -> ssl.SSLContext | None:
    """Return a context that trusts what the system trusts, which asyncpg can't read from a URL."""
    if parameters.get("sslrootcert") != conninfo.SYSTEM:
        return None
    context = ssl.create_default_context()
    context.set_alpn_protocols(ALPN)
    for name, attribute in (
        ("ssl_min_protocol_version", "minimum_version"),
        ("ssl_max_protocol_version", "maximum_version"),
    ):
        if name in parameters:
            setattr(context, attribute, ssl.TLSVersion[parameters[name].replace(".", "_")])
    conninfo.load_client_certificate(context, parameters)
    return context


def _set_socket_options(connection: Any, parameters: Mapping[str, str]) -> None:
    """Set what libpq's parameters say about TCP; 0 leaves the system's value."""
    transport = connection._transport  # noqa: SLF001
    own = transport.get_extra_info("socket")
    if own is None or own.family == socket.AF_UNIX or parameters.keys().isdisjoint(conninfo.KEEPALIVES):
        return
    with socket.socket(fileno=socket.dup(own.fileno())) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(parameters.get("keepalives", "1")))
        for name, option in SOCKET_OPTIONS.items():
            value = int(parameters.get(name, "0"))
            if value > 0 and hasattr(socket, option):
                tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
