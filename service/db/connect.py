"""Connects to PostgreSQL: to the first of several hosts that fits, with the parameters of libpq."""

import random
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from service.db import conninfo
from service.db.conninfo import DEFAULT_PORT
from service.db.errors import NoUsableHost, short_cause
from service.settings import environment

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


class WrongHost(ConnectionError):
    """A server that `target_session_attrs` excludes; after a failover it may fit."""


ANSWERS = (WrongHost, asyncpg.CannotConnectNowError)


class _Connection(asyncpg.Connection):
    # asyncpg sets it last. Without it, the end of a connection that fails before prints a traceback.
    _source_traceback = None


def postgresql_engine(
    url: str,
    *,
    timeout: float | None = None,
    server_settings: Mapping[str, str] | None = None,
    connect_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncEngine:
    """Return an engine for a connection string of PostgreSQL; raises ValueError for a wrong one.

    `timeout` is for a URL without `connect_timeout`. The `server_settings` override those of the URL, except
    the application name.
    """
    parameters = conninfo.read(url, environment())
    own = conninfo.server_settings(parameters)
    name = {"application_name": own["application_name"]} if "application_name" in own else {}
    caches = ("prepared_statement_cache_size", "statement_cache_size")
    arguments = {
        "async_creator_fn": _creator(parameters),
        "timeout": _timeout(parameters, timeout),
        "server_settings": {**own, **(server_settings or {}), **name},
        **{name: int(parameters[name]) for name in caches if name in parameters},
        **(connect_args or {}),
    }
    return create_async_engine("postgresql+asyncpg://", connect_args=arguments, **options)


def _timeout(parameters: Mapping[str, str], default: float | None) -> float | None:
    """Return the time limit for each host in seconds; None, like 0 in libpq, is no limit."""
    if "connect_timeout" not in parameters:
        return default
    seconds = int(parameters["connect_timeout"])
    return seconds if seconds > 0 else None


def _creator(parameters: Mapping[str, str]) -> Any:
    async def create(**options: Any) -> Any:
        return await connect(parameters, **options)

    return create


async def connect(parameters: Mapping[str, str], **options: Any) -> Any:
    """Return a connection to the first host that answers and has the `target_session_attrs`.

    Raises NoUsableHost if there is none, and asyncpg's error if a server refuses. As for libpq, each host has
    the whole timeout, and a refused login ends the search.
    """
    errors: dict[str, Exception] = {}  # by host; `prefer-standby` tries each twice
    for host, port, session_attributes in _candidates(parameters):
        try:
            connection = await _connect(parameters, host, port, session_attributes, options)
        except (OSError, asyncpg.CannotConnectNowError) as error:
            errors[_name(host, port)] = error
        else:
            _set_socket_options(connection, parameters)
            # A COPY that is blocked on a full write buffer never notices a lost connection or a timeout.
            connection._transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)  # noqa: SLF001
            return connection
    *_, last = errors.values()
    if len(errors) == 1 and not isinstance(last, OSError):
        raise last
    was_reached = any(isinstance(error, ANSWERS) for error in errors.values())
    causes = "; ".join(f"{name}: {short_cause(error)}" for name, error in errors.items())
    raise NoUsableHost(causes, was_reached=was_reached) from last


def _name(host: str | None, port: int | None) -> str:
    """Return a host as an error names it, with its port or socket."""
    port = port or DEFAULT_PORT
    if host is None:
        return f"this machine, port {port}"
    if host.startswith("/"):
        return f"{host}/.s.PGSQL.{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _candidates(parameters: Mapping[str, str]) -> Iterator[tuple[str | None, int | None, str]]:
    """Yield the hosts in the order in which to try them, with what each must be."""
    places = conninfo.addresses(parameters)
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(places)
    wanted = parameters.get("target_session_attrs", "any")
    for attributes in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
        for host, port in places:
            yield host, port, attributes


async def _connect(
    parameters: Mapping[str, str],
    host: str | None,
    port: int | None,
    session_attributes: str,
    options: Mapping[str, Any],
) -> Any:
    arguments = {ours: parameters[name] for name, ours in ARGUMENTS.items() if name in parameters}
    try:
        # asyncpg accepts most TLS parameters only in a URL; the arguments override what a URL contains.
        return await asyncpg.connect(  # type: ignore[call-overload]  # the options are those of SQLAlchemy
            f"postgresql://?{urlencode(_tls_parameters(parameters))}",
            host=host,
            port=port,
            ssl=_system_tls(parameters),
            target_session_attrs=session_attributes,
            connection_class=_Connection,
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
