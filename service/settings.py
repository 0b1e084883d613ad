"""Settings of the service, from the environment, secret files and `.env`."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from socket import has_dualstack_ipv6
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from service.db import conninfo
from service.variables import FOR_CLIENTS, PREFIX, clean, environment, folder_variables, is_local

SQLITE = "sqlite+aiosqlite"
DATABASE_URLS = {f"{PREFIX}DATABASE_URL", f"{PREFIX}DATABASE_URL_FILE", "DATABASE_URL"}
MIGRATION_URLS = {f"{PREFIX}MIGRATION_URL", f"{PREFIX}MIGRATION_URL_FILE"}
REPLICA_URLS = {f"{PREFIX}REPLICA_URL", f"{PREFIX}REPLICA_URL_FILE"}
# Variables of the tests, and those that Kubernetes sets for a service named roster.
FOREIGN = re.compile(rf"{PREFIX}(TEST_|SERVICE_|PORT(_|$))")
ADDRESS = re.compile(r"unix:.+|(\[.+\]|[^:\[]*):([0-9]{1,5})")
EVERY_ADDRESS = ("0.0.0.0", "[::]")  # noqa: S104  (refused unless it is asked for)
EVERY_HOST = re.compile(r"^\*?(?=:[0-9]+$)")  # no host, as Go and Docker have it, or a star
MAX_PORT = 65535
MIN_GRACE_SECONDS = 3  # after the pause; the last 2 are for calls that are cut off

MAX_SECONDS = 1_000_000  # gRPC and PostgreSQL count milliseconds in 32 bits
MAX_TTL = timedelta(days=36_500)
MAY_BE_EMPTY = {"metrics_listen", "health_listen"}
LOG_LEVELS = {"WARN": "WARNING", "FATAL": "CRITICAL", "TRACE": "DEBUG"}  # as other programs name ours
# Variables that people and platforms use for a database, with these words or with a URL of PostgreSQL.
DATABASE_VARIABLE = re.compile(
    r"(DB|DATABASE|PG|PSQL|POSTGRES|POSTGRESQL|SQLALCHEMY)(_\w+)?_?(URL|URI|DSN|HOST|HOSTADDR|SERVICE|DATABASE|NAME)"
)
POSTGRESQL_URL = re.compile(r"(jdbc:)?postgres(ql)?(\+\w+)?://")


def _duration(value: Any) -> Any:
    """Return seconds as a timedelta; anything else is left to pydantic, which reads ISO 8601."""
    try:
        return timedelta(seconds=float(value))
    except (TypeError, ValueError, OverflowError):
        return value


Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Pause = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Duration = Annotated[timedelta, Field(gt=timedelta(0), le=MAX_TTL), BeforeValidator(_duration)]
Count = Annotated[int, Field(ge=1)]


def _without_empty(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return variables without the empty ones, which platforms set for what is not set.

    A few settings can be empty, and then mean none.
    """
    may_be_empty = {f"{PREFIX}{name.upper()}" for name in MAY_BE_EMPTY}
    return {
        name: value
        for name, value in variables.items()
        if name.upper() in may_be_empty or (value is not None and clean(value))
    }


class EnvironmentVariables(EnvSettingsSource):
    """Settings from the environment."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return _without_empty(super()._load_env_vars())


class FolderVariables(EnvSettingsSource):
    """Settings from the file `.env` of the current folder."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return _without_empty({name.lower(): value for name, value in folder_variables().items()})


class SecretFiles(PydanticBaseSettingsSource):
    """`ROSTER_X_FILE` names a file that contains the value of `ROSTER_X`, as platforms mount secrets."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self._variables = {**_without_empty(folder_variables()), **_without_empty(os.environ)}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"{PREFIX}{field_name.upper()}"
        path = self._variables.get(f"{variable}_FILE")
        # All sources use the first alias of a field as its key: otherwise pydantic would not see that one
        # source overrides another.
        key = variable if field.validation_alias else field_name
        try:
            return (Path(clean(path)).read_text("utf-8-sig") if path else None), key, False
        except OSError as error:
            raise OSError(f"{variable}_FILE can't be read: {error}") from None
        except UnicodeDecodeError:
            raise OSError(f"{variable}_FILE names a file that is not UTF-8; save it as UTF-8") from None

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields.items()
        values = [self.get_field_value(field, name) for name, field in fields]
        return {key: value for value, key, _ in values if value is not None}


class Settings(BaseSettings):
    """Every setting; `ROSTER_` and its name in capitals is its environment variable."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,  # it can be a password
    )

    tls_cert_file: Path | None = Field(None, description="server certificate chain, in PEM")
    tls_key_file: Path | None = Field(None, description="private key of the certificate, in PEM")
    tls_client_ca_file: Path | None = Field(
        None, description="CA of client certificates, in PEM; callers must then present one"
    )
    jwt_issuer: str | None = Field(None, description="required `iss` claim of bearer tokens")
    jwt_audience: str | None = Field(None, description="required `aud` claim of bearer tokens")
    jwt_keys_file: Path | None = Field(None, description="public keys of the issuer, as JWKS or PEM")
    policy_file: Path | None = Field(None, description="roles of callers, in TOML")
    insecure: bool = Field(
        default=False, description="allow non-loopback addresses without TLS and authentication"
    )
    listen: str = Field("127.0.0.1:50051", description="host:port, or unix:/path; port 0 picks a free port")
    reflection: bool | None = Field(
        None,
        description="serve gRPC reflection, which grpcurl needs; by default only on a loopback address",
    )
    metrics_listen: str = Field(
        "127.0.0.1:9464", description="address of the Prometheus metrics, host:port; empty for none"
    )
    health_listen: str = Field(
        "", description="additional address for health checks, host:port, never with TLS; empty for none"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="lowest level that is logged"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json or text; auto is text on a terminal, otherwise json"
    )
    slow_call: Seconds = Field(1, description="seconds after which a call is logged as a warning")
    drain_pause: Pause = Field(
        0, description="seconds between NOT_SERVING and refusing calls, so that load balancers notice"
    )
    grace: Seconds = Field(30, description="seconds that shutdown may take; calls in flight have 2 less")

    database_url: str = Field(
        "sqlite:///roster.db",
        description="postgresql://user@host/name, or sqlite:///file",
        validation_alias=AliasChoices("ROSTER_DATABASE_URL", "DATABASE_URL"),
    )
    database_required: bool = Field(
        default=False, description="don't start without a database URL; the container image sets this"
    )
    migration_url: str | None = Field(
        None,
        description="the same database for `roster migrate`: as the owner of the schema, without a pooler; "
        "by default ROSTER_DATABASE_URL",
    )
    replica_url: str | None = Field(
        None,
        description="standbys of the same PostgreSQL for reads with a consistency token, host,host; by "
        "default none",
    )
    database_pooler: Literal["none", "session", "transaction"] = Field(
        "none",
        description="mode of the pooler, such as PgBouncer, between Roster and PostgreSQL: what a client "
        "gets a connection for",
    )
    pool_size: Count = Field(10, description="connections kept open for calls")
    max_overflow: int = Field(10, ge=0, description="extra connections under load")
    pool_timeout: Seconds = Field(2, description="seconds that a call waits for a connection")
    pool_recycle: Seconds = Field(1800, description="seconds after which a PostgreSQL connection is replaced")
    pool_pre_ping: bool = Field(
        default=False, description="test a PostgreSQL connection before each use; halves the throughput"
    )
    connect_timeout: Seconds = Field(5, description="seconds to open a PostgreSQL connection")
    database_wait: Pause = Field(30, description="seconds that startup waits for an unreachable database")
    statement_timeout: Seconds = Field(30, description="seconds that a statement may take")
    bulk_connections: Count = Field(
        5, description="PostgreSQL connections for bulk streams, in addition to the pool"
    )

    bulk_load_ttl: Duration = Field(
        timedelta(days=7),
        description="how long outcomes are kept after a load's last batch, in seconds or ISO 8601",
    )

    changes_ttl: Duration = Field(
        timedelta(days=7),
        description="how long changes are kept for watchers that were away, in seconds or ISO 8601",
    )

    workers: Count = Field(1, description="processes that share the port; more than 1 requires PostgreSQL")
    password_memory: int = Field(19_456, ge=1024, le=1 << 20, description="argon2 memory per hash, in KiB")
    password_passes: int = Field(2, ge=1, le=16, description="argon2 iterations")
    password_lanes: int = Field(1, ge=1, le=16, description="argon2 parallelism: cores that a hash may use")
    password_workers: Count = Field(2, description="threads that hash passwords")
    password_queue: Count = Field(
        64, description="pending password hashes per caller; more are refused as overload"
    )

    max_connection_age: Seconds = Field(
        600, description="maximum age of a connection in seconds, so that clients rebalance"
    )
    max_calls: Count = Field(2000, description="calls in flight; more are refused as overload")
    max_watchers: Count = Field(
        1000, description="open watches of the change feed; more are refused as overload"
    )
    caller_calls: Count = Field(500, description="calls in flight per caller and method")
    caller_streams: Count = Field(16, description="open streams per caller and method")
    caller_rate: Count = Field(20_000, description="calls per second, per caller and method")
    stream_idle_timeout: Seconds = Field(300, description="seconds that a stream waits for its client")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        environment = EnvironmentVariables(settings_cls)
        return init_settings, environment, SecretFiles(settings_cls), FolderVariables(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: Any, info: ValidationInfo) -> Any:
        """Strip white space, such as a newline at the end of a secret, and refuse empty values."""
        if not isinstance(value, str):
            return value
        value = clean(value)
        if not value and info.field_name not in MAY_BE_EMPTY:
            raise ValueError("is empty; give it a value, or leave it unset to use the default")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _spell_log_level(cls, value: Any) -> Any:
        """Return the level by the name that Python has for it."""
        if not isinstance(value, str):
            return value
        level = value.strip().upper()
        return LOG_LEVELS.get(level, level)

    @field_validator("log_format", "database_pooler", mode="before")
    @classmethod
    def _spell_in_lower_case(cls, value: Any) -> Any:
        """Return a name in lower case."""
        return value.lower() if isinstance(value, str) else value

    @field_validator("database_url", "migration_url", "replica_url")
    @classmethod
    def _add_driver(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.lower().startswith("sqlite"):
            conninfo.read(value, environment())
            return conninfo.normalise(value)
        try:
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise ValueError("is not a URL; write postgresql://user@host/name or sqlite:///file") from None
        if url.drivername not in ("sqlite", SQLITE):
            raise ValueError(f"has the scheme {url.drivername}; postgresql and sqlite are supported")
        if url.database in (None, "", ":memory:"):
            raise ValueError("names no file; connections can't share an in-memory SQLite database")
        return url.set(drivername=SQLITE).render_as_string(hide_password=False)

    @field_validator("metrics_listen", "health_listen")
    @classmethod
    def _check_optional_address(cls, value: str) -> str:
        if value.startswith("unix:"):
            raise ValueError("must be host:port, or empty")
        return value and cls._check_address(value)

    @field_validator("listen")
    @classmethod
    def _check_address(cls, value: str) -> str:
        address = ADDRESS.fullmatch(value)
        # gRPC takes a larger port modulo 65536.
        if not address or int(address[2] or 0) > MAX_PORT:
            raise ValueError(f"must be host:port, with a port up to {MAX_PORT}, or unix:/path")
        return EVERY_HOST.sub(_every_host(), value, count=1)

    @model_validator(mode="wrap")
    @classmethod
    def _report_everything(cls, values: dict[str, Any], validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Report everything that is wrong at once: values by themselves, and contradictions among them."""
        problems: list[InitErrorDetails] = []
        wrong: set[str] = set()
        try:
            settings = validate(values)
        except ValidationError as error:
            problems = [_problem(each["loc"], each["type"], each.get("ctx", {})) for each in error.errors()]
            wrong = {_field_name(problem) for problem in problems}
            # The other settings may contradict each other: look at them with defaults for the wrong ones.
            rest = {key: value for key, value in values.items() if _without_prefix(key) not in wrong}
            settings = validate(rest)
        written = clean(str(values.get("listen", settings.listen)))
        for found in _contradictions(settings, written):
            if wrong.isdisjoint(found.fields):
                context = {"error": ValueError(found.message)}
                problems.append(_problem((found.fields[0],), "value_error", context))
        if problems:
            order = [*cls.model_fields]
            problems.sort(key=lambda problem: order.index(_field_name(problem)))
            raise ValidationError.from_exception_data(cls.__name__, problems, hide_input=True)
        if settings.reflection is None:
            settings.reflection = is_local(settings.listen)
        return settings

    @property
    def direct_url(self) -> str:
        """The URL of the database for migrations."""
        return self.migration_url or self.database_url

    @property
    def pools_transactions(self) -> bool:
        """Whether a pooler gives Roster a session of PostgreSQL for each transaction."""
        return self.database_pooler == "transaction"

    @property
    def is_embedded(self) -> bool:
        """Whether the database is SQLite."""
        return self.database_url.startswith("sqlite")


def is_password_redirected(settings: Settings) -> bool:
    """Return whether PGPASSWORD, from the environment, would be sent to a database named in `.env`."""
    urls = [
        (settings.database_url, DATABASE_URLS),
        (settings.migration_url, MIGRATION_URLS),
        (settings.replica_url, REPLICA_URLS),
    ]
    return "PGPASSWORD" in os.environ and any(
        url and _needs_password(url) and _is_named_in_folder(variables) for url, variables in urls
    )


def _needs_password(database_url: str) -> bool:
    return not database_url.startswith("sqlite") and "password" not in conninfo.parse(database_url)


def _is_named_in_folder(variables: set[str]) -> bool:
    """Return whether `.env` sets one of these variables, and the environment sets none of them."""
    is_in_environment = not variables.isdisjoint(map(str.upper, os.environ))
    return not is_in_environment and not variables.isdisjoint(folder_variables())


def unknown_settings() -> Iterator[str]:
    """Yield a warning for each variable, in the environment or .env, with our prefix and no meaning."""
    known = FOR_CLIENTS.keys() | {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name in sorted(set(map(str.upper, os.environ.keys() | folder_variables().keys()))):
        is_ours = name.startswith(PREFIX) and not FOREIGN.match(name)
        if is_ours and {name, name.removesuffix("_FILE")}.isdisjoint(known):
            # Without the prefix, which would make all names similar.
            names = [one.removeprefix(PREFIX) for one in known]
            close = get_close_matches(name.removeprefix(PREFIX), names, 1)
            yield f"unknown setting {name}" + "".join(f"; did you mean {PREFIX}{one}?" for one in close)


def unread_databases(settings: Settings) -> Iterator[str]:
    """Yield a warning for each variable that seems to name a database, if the default one is used."""
    if "database_url" in settings.model_fields_set:
        return
    variables = _without_empty({**folder_variables(), **os.environ})
    for name, value in sorted(variables.items()):
        is_ours = name.upper().startswith(PREFIX)  # an unknown one of these has its own warning
        if not is_ours and (
            DATABASE_VARIABLE.fullmatch(name.upper()) or POSTGRESQL_URL.match(clean(value or ""))
        ):
            yield f"{name} is set, but not read; set ROSTER_DATABASE_URL to use that database"


def describe_database(url: str) -> str:
    """Return which database a URL names, without a password."""
    if url.startswith("sqlite"):
        return f"SQLite, {Path(make_url(url).database or '').absolute()}"
    return conninfo.describe(url, environment())


def database_warnings(settings: Settings) -> Iterator[str]:
    """Yield a warning for each parameter of the URL that PostgreSQL's driver does not honour as it is."""
    if not settings.is_embedded:
        urls = filter(None, (settings.database_url, settings.replica_url))
        found = (conninfo.warnings(conninfo.read(url, environment())) for url in urls)
        yield from dict.fromkeys(chain.from_iterable(found))


def _every_host() -> str:
    """Return the address of all interfaces, of IPv6 and IPv4 if this machine has both."""
    return "[::]" if has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104  (asked for, and checked like others)


@dataclass(frozen=True)
class Contradiction:
    """Settings that don't work together; the first of `fields` is the one to report."""

    fields: tuple[str, ...]
    message: str


def _contradictions(settings: Settings, written: str) -> Iterator[Contradiction]:
    """Yield what contradicts itself; `written` is the address to listen on, as the user wrote it."""
    yield from _contradictions_of_callers(settings)
    yield from _exposure(settings, written)
    if settings.database_required and "database_url" not in settings.model_fields_set:
        yield Contradiction(
            ("database_url", "database_required"),
            "is not set; set it to postgresql://user@host/name, or to sqlite:////volume/roster.db for SQLite",
        )
    if settings.drain_pause and settings.grace < settings.drain_pause + MIN_GRACE_SECONDS:
        yield Contradiction(
            ("grace", "drain_pause"),
            f"must be at least {MIN_GRACE_SECONDS} s more than ROSTER_DRAIN_PAUSE, which it includes: the "
            "rest is for calls in flight",
        )
    if settings.direct_url.startswith("sqlite") != settings.is_embedded:
        yield Contradiction(
            ("migration_url", "database_url"),
            "must name the database of ROSTER_DATABASE_URL, but one is PostgreSQL and the other SQLite",
        )
    if settings.replica_url and (settings.is_embedded or settings.replica_url.startswith("sqlite")):
        yield Contradiction(
            ("replica_url", "database_url"),
            "names standbys of the PostgreSQL in ROSTER_DATABASE_URL; with SQLite, leave it unset",
        )
    if settings.database_pooler != "none" and settings.is_embedded:
        yield Contradiction(
            ("database_pooler", "database_url"),
            "must be none with SQLite; poolers are for PostgreSQL",
        )
    elif settings.pools_transactions:
        yield from _contradictions_of_pooler(settings)
    if settings.workers > 1 and settings.is_embedded:
        yield Contradiction(
            ("workers", "database_url"),
            "must be 1 with SQLite, which has one writer at a time; more than one need PostgreSQL",
        )
    if settings.workers > 1 and settings.listen.startswith("unix:"):
        yield Contradiction(
            ("workers", "listen"),
            "must be 1 with a Unix socket, which can't be shared; more than one need host:port",
        )


def _contradictions_of_callers(settings: Settings) -> Iterator[Contradiction]:
    has_tls = bool(settings.tls_cert_file)
    authenticates = bool(settings.tls_client_ca_file or settings.jwt_keys_file)
    if has_tls != bool(settings.tls_key_file):
        yield Contradiction(
            ("tls_key_file", "tls_cert_file"),
            "must be set together with ROSTER_TLS_CERT_FILE; set both, or neither",
        )
    if settings.tls_client_ca_file and not has_tls:
        yield Contradiction(
            ("tls_client_ca_file", "tls_cert_file"),
            "needs ROSTER_TLS_CERT_FILE and ROSTER_TLS_KEY_FILE; set these too",
        )
    if len({bool(settings.jwt_keys_file), bool(settings.jwt_issuer), bool(settings.jwt_audience)}) > 1:
        yield Contradiction(
            ("jwt_keys_file", "jwt_issuer", "jwt_audience"),
            "must be set together with ROSTER_JWT_ISSUER and ROSTER_JWT_AUDIENCE; set all of them, or none",
        )
    if bool(settings.policy_file) != authenticates:
        yield Contradiction(
            ("policy_file", "tls_client_ca_file", "jwt_keys_file"),
            "must be set together with ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE: these say who a "
            "caller is, the policy says what the caller may do",
        )


def _contradictions_of_pooler(settings: Settings) -> Iterator[Contradiction]:
    parameters = conninfo.read(settings.database_url, environment())
    if lost := conninfo.session_settings(parameters):
        yield Contradiction(
            ("database_url", "database_pooler"),
            f"sets {', '.join(lost)} for the session, which a pooler in transaction mode does not keep; use "
            "ALTER ROLE … SET in PostgreSQL instead",
        )
    if caches := [name for name in conninfo.CACHES if int(parameters.get(name, "0"))]:
        yield Contradiction(
            ("database_url", "database_pooler"),
            f"sets {' and '.join(caches)}, but a pooler in transaction mode keeps no prepared statements; "
            "remove it",
        )


def _exposure(settings: Settings, written: str) -> Iterator[Contradiction]:
    authenticates = bool(settings.tls_client_ca_file or settings.jwt_keys_file)
    is_secured = bool(settings.tls_cert_file) and authenticates
    if settings.insecure or is_secured or is_local(settings.listen):
        return
    host, _, port = settings.listen.rpartition(":")
    meaning = "means all interfaces" if host in EVERY_ADDRESS else "is not only for this machine"
    yield Contradiction(
        ("listen", "insecure", "tls_cert_file", "tls_client_ca_file", "jwt_keys_file"),
        f"`{written}` {meaning}: use 127.0.0.1:{port}, or require TLS and authentication with "
        "ROSTER_TLS_CERT_FILE and ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE, or set "
        "ROSTER_INSECURE=true if the network keeps strangers out",
    )


def _problem(loc: tuple[int | str, ...], kind: str, context: dict[str, Any]) -> InitErrorDetails:
    # Without the value, which can be a password.
    return InitErrorDetails(type=kind, loc=loc, input=None, ctx=context)


def _field_name(problem: InitErrorDetails) -> str:
    return _without_prefix(str(problem["loc"][0]))


def _without_prefix(key: str) -> str:
    """Return the name of the field that a source's key means: of `ROSTER_DATABASE_URL` `database_url`."""
    return key.lower().removeprefix(PREFIX.lower())
