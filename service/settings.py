"""Settings: the only reader of the environment."""

import os
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from stat import S_IWOTH
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import AliasChoices, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

PREFIX = "ROSTER_"
DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}
# Variables of the commands that are clients of a server, and of `roster token`, with their options.
FOR_CLIENTS = {
    f"{PREFIX}ADDRESS": "address",
    f"{PREFIX}TLS_CA_FILE": "tls_ca",
    f"{PREFIX}TLS_CLIENT_CERT_FILE": "tls_cert",
    f"{PREFIX}TLS_CLIENT_KEY_FILE": "tls_key",
    f"{PREFIX}TOKEN_FILE": "token_file",
    f"{PREFIX}TOKEN": "token",
}
FOR_TOKENS = {f"{PREFIX}JWT_ISSUER": "issuer", f"{PREFIX}JWT_AUDIENCE": "audience"}
DATABASE_URLS = {f"{PREFIX}DATABASE_URL", f"{PREFIX}DATABASE_URL_FILE", "DATABASE_URL"}
# Of tests, and what Kubernetes sets for a service that is named roster.
FOREIGN = re.compile(rf"{PREFIX}(TEST_|SERVICE_|PORT(_|$))")
ADDRESS = re.compile(r"unix:.+|(\[.+\]|[^:\[]*):([0-9]{1,5})")
MAX_PORT = 65535
MIN_GRACE_SECONDS = 3  # behind the pause; 2 of them are for calls that are cut off

MAX_SECONDS = 1_000_000  # gRPC and PostgreSQL count milliseconds in 32 bits
MAX_TTL = timedelta(days=36_500)
MAY_BE_EMPTY = {"metrics_listen", "health_listen"}


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


def folder_variables() -> dict[str, str]:
    """Return the variables in the file `.env` of the current folder, in capitals, as they stand there.

    Nothing is expanded: `${ROSTER_TOKEN}` in an address would send the token to it. Raises OSError if another
    user can have written the file.
    """
    path = Path(".env")
    if not (path.is_file() or path.is_fifo()):
        return {}
    with path.open() as file:
        status = os.fstat(file.fileno())
        if status.st_uid not in (0, os.geteuid()):
            raise OSError(
                f"{Path.cwd()}/.env belongs to another user; change its owner, or use another folder"
            )
        if status.st_mode & S_IWOTH:
            raise OSError(f"other users can change {Path.cwd()}/.env; run: chmod go-w .env")
        variables = dotenv_values(stream=file, interpolate=False)
    return {name.upper(): value for name, value in variables.items() if value is not None}


class FolderVariables(EnvSettingsSource):
    """Settings from the file `.env` of the current folder."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in folder_variables().items()}


class SecretFiles(PydanticBaseSettingsSource):
    """`ROSTER_X_FILE` names a file whose content is `ROSTER_X`, as container platforms hand out secrets."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self._variables = {**folder_variables(), **os.environ}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"{PREFIX}{field_name.upper()}"
        path = self._variables.get(f"{variable}_FILE")
        # A field that has aliases goes by the first of them in every source: otherwise none beats the other.
        key = variable if field.validation_alias else field_name
        try:
            return (Path(path).read_text().strip() if path else None), key, False
        except OSError as error:
            raise OSError(f"{variable}_FILE: can't be read: {error}") from None

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields.items()
        values = [self.get_field_value(field, name) for name, field in fields]
        return {key: value for value, key, _ in values if value is not None}


class Settings(BaseSettings):
    """Every setting of the service; `ROSTER_` and the name in capitals is its environment variable."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,  # it can be a password
    )

    tls_cert_file: Path | None = Field(None, description="certificate chain of the server, in PEM")
    tls_key_file: Path | None = Field(None, validate_default=True, description="its private key, in PEM")
    tls_client_ca_file: Path | None = Field(
        None, description="CA of the certificates that callers then must have, in PEM"
    )
    jwt_issuer: str | None = Field(None, description="`iss` of the bearer tokens that are accepted")
    jwt_audience: str | None = Field(None, description="`aud` of the same")
    jwt_keys_file: Path | None = Field(
        None, validate_default=True, description="public keys of the issuer, as JWKS or PEM"
    )
    policy_file: Path | None = Field(
        None, validate_default=True, description="TOML that says which caller has which roles"
    )
    insecure: bool = Field(default=False, description="listen beyond this machine without these")
    listen: str = Field("127.0.0.1:50051", description="host:port, or unix:/path; port 0 takes a free one")
    reflection: bool | None = Field(
        None,
        validate_default=True,
        description="let grpcurl and others ask for the contract; by default on this machine only",
    )
    metrics_listen: str = Field(
        "127.0.0.1:9464", description="host:port where Prometheus finds the metrics; empty for none"
    )
    health_listen: str = Field(
        "", description="host:port of the health service alone, always without TLS; empty for none"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="least severe line logged"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json, or text for a terminal; auto tells by standard error"
    )
    slow_call: Seconds = Field(1, description="seconds after which a call is logged as a warning")
    drain_pause: Pause = Field(
        0, description="seconds between NOT_SERVING and refusing calls, for load balancers to notice"
    )
    grace: Seconds = Field(30, description="seconds a stop may take; calls in flight have that less 2")

    database_url: str = Field(
        "sqlite:///roster.db",
        description="postgresql://user@host/name, or sqlite:///file",
        validation_alias=AliasChoices("ROSTER_DATABASE_URL", "DATABASE_URL"),
    )
    pool_size: Count = Field(10, description="connections kept open for calls")
    max_overflow: int = Field(10, ge=0, description="connections more for a rush")
    pool_timeout: Seconds = Field(2, description="seconds a call waits for a connection")
    pool_recycle: Seconds = Field(
        1800, description="seconds after which a connection to PostgreSQL is replaced"
    )
    pool_pre_ping: bool = Field(
        default=False, description="test each connection to PostgreSQL before its use; halves the speed"
    )
    connect_timeout: Seconds = Field(5, description="seconds to open a connection to PostgreSQL")
    database_wait: Pause = Field(30, description="seconds the start waits for a database that is away")
    statement_timeout: Seconds = Field(30, description="seconds one statement may take")
    bulk_connections: Count = Field(
        5, description="connections to PostgreSQL for the bulk streams, apart from the pool"
    )

    bulk_load_ttl: Duration = Field(
        timedelta(days=7),
        description="how long outcomes are kept after a load's last batch, in seconds or ISO 8601",
    )

    workers: Count = Field(1, description="processes that share the port; more than one need PostgreSQL")
    password_memory: int = Field(19_456, ge=1024, le=1 << 20, description="KiB that hashing one takes")
    password_passes: int = Field(2, ge=1, le=16, description="how often hashing goes over its memory")
    password_lanes: int = Field(1, ge=1, le=16, description="cores that hashing one may take")
    password_workers: Count = Field(2, description="threads that hash passwords")
    password_queue: Count = Field(
        64, description="hashings of one caller in hand; more are refused as overload"
    )

    max_connection_age: Seconds = Field(
        600, description="seconds until a client is to connect anew, and finds new servers"
    )
    max_calls: Count = Field(2000, description="calls in flight; more are refused as overload")
    caller_calls: Count = Field(500, description="calls of one method that a caller may have in flight")
    caller_streams: Count = Field(16, description="streams of one method that a caller may have open")
    caller_rate: Count = Field(20_000, description="calls of one method that a caller may begin in a second")
    stream_idle_timeout: Seconds = Field(300, description="seconds a stream waits for its client")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFiles(settings_cls), FolderVariables(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _trimmed(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept what platforms leave around a value, such as a newline at its end."""
        if not isinstance(value, str):
            return value
        value = value.strip()
        if not value and info.field_name not in MAY_BE_EMPTY:
            raise ValueError("is empty; give it a value, or leave it unset for its default")
        return value

    @field_validator("database_url")
    @classmethod
    def _with_driver(cls, value: str) -> str:
        try:
            url = make_url(value)
        except (ArgumentError, ValueError):
            raise ValueError("is no URL; write postgresql://user@host/name or sqlite:///file") from None
        if url.drivername not in DRIVERS:
            raise ValueError(f"has the scheme {url.drivername}; postgresql and sqlite are supported")
        if url.drivername.startswith("sqlite") and url.database in (None, "", ":memory:"):
            raise ValueError("names no file: SQLite in memory can't be shared by readers and the writer")
        return url.set(drivername=DRIVERS[url.drivername]).render_as_string(hide_password=False)

    @field_validator("tls_key_file")
    @classmethod
    def _with_certificate(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return _together(value, info, "tls_cert_file")

    @field_validator("tls_client_ca_file")
    @classmethod
    def _with_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value and not info.data.get("tls_cert_file"):
            raise ValueError("works with ROSTER_TLS_CERT_FILE and ROSTER_TLS_KEY_FILE only; set these too")
        return value

    @field_validator("jwt_keys_file")
    @classmethod
    def _with_claims(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return _together(value, info, "jwt_issuer", "jwt_audience")

    @field_validator("policy_file")
    @classmethod
    def _with_identities(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        knows = _knows_callers(info)
        # Where one of these is wrong, that is told already.
        is_sure = knows or {"tls_client_ca_file", "jwt_keys_file"} <= info.data.keys()
        if is_sure and bool(value) != knows:
            raise ValueError(
                "goes with ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE: those say who calls, it says "
                "what they may do, and none of them is of use alone"
            )
        return value

    @field_validator("metrics_listen", "health_listen")
    @classmethod
    def _is_address_or_none(cls, value: str) -> str:
        if value.startswith("unix:"):
            raise ValueError("must be host:port, or empty")
        return value and cls._is_address(value)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        address = ADDRESS.fullmatch(value)
        # gRPC would take a larger port modulo 65536.
        if not address or int(address[2] or 0) > MAX_PORT:
            raise ValueError(f"must be host:port, with a port up to {MAX_PORT}, or unix:/path")
        return value

    @field_validator("listen")
    @classmethod
    def _local_unless_safe(cls, value: str, info: ValidationInfo) -> str:
        is_safe = info.data.get("tls_cert_file") and _knows_callers(info)
        if not (is_safe or info.data.get("insecure") or is_local(value)):
            raise ValueError(
                "without TLS and authentication the server listens on this machine only; set "
                "ROSTER_TLS_CERT_FILE and ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE, or use "
                "127.0.0.1, [::1] or unix:/path, or set ROSTER_INSECURE=true if the network keeps "
                "strangers out"
            )
        return value

    @field_validator("grace")
    @classmethod
    def _beyond_pause(cls, value: float, info: ValidationInfo) -> float:
        pause = info.data.get("drain_pause", 0)
        if pause and value < pause + MIN_GRACE_SECONDS:
            raise ValueError(
                f"must be at least {MIN_GRACE_SECONDS} s more than ROSTER_DRAIN_PAUSE, which it includes: "
                "the rest is for calls in flight"
            )
        return value

    @field_validator("reflection")
    @classmethod
    def _on_this_machine(cls, value: bool | None, info: ValidationInfo) -> bool:
        return is_local(info.data.get("listen", "")) if value is None else value

    @field_validator("workers")
    @classmethod
    def _can_share(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("database_url", "").startswith("sqlite"):
            raise ValueError("must be 1 on SQLite, which has one writer at a time; several need PostgreSQL")
        if value > 1 and info.data.get("listen", "").startswith("unix:"):
            raise ValueError("must be 1 on a Unix socket, which can't be shared; several need host:port")
        return value

    @property
    def otlp_protocol(self) -> str | None:
        """How traces are sent, "grpc" or "http/protobuf"; None where OpenTelemetry was given no endpoint."""
        traces, all_signals = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
        if not any(os.environ.get(f"{prefix}ENDPOINT") for prefix in (traces, all_signals)):
            return None
        protocols = (os.environ.get(f"{prefix}PROTOCOL") for prefix in (traces, all_signals))
        return next(filter(None, protocols), "http/protobuf")

    @property
    def is_embedded(self) -> bool:
        """Tell whether the database is SQLite, the embedded default."""
        return self.database_url.startswith("sqlite")


def folder_options(options: Mapping[str, str]) -> dict[str, Any]:
    """Return the defaults that `.env` has for options, by their variables; raises OSError."""
    variables = folder_variables()
    return {option: variables[name] for name, option in options.items() if variables.get(name)}


def is_password_redirected(database_url: str) -> bool:
    """Tell whether `.env` names the database to which a password of the environment would be sent."""
    url = make_url(database_url)
    if "PGPASSWORD" not in os.environ or url.password or url.get_backend_name() != "postgresql":
        return False
    is_in_environment = not DATABASE_URLS.isdisjoint(map(str.upper, os.environ))
    return not is_in_environment and not DATABASE_URLS.isdisjoint(folder_variables())


def unknown_settings() -> Iterator[str]:
    """Yield a sentence for each variable with our prefix, in the environment or .env, that says nothing."""
    known = FOR_CLIENTS.keys() | {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name in sorted(set(map(str.upper, os.environ.keys() | folder_variables().keys()))):
        is_ours = name.startswith(PREFIX) and not FOREIGN.match(name)
        if is_ours and {name, name.removesuffix("_FILE")}.isdisjoint(known):
            close = get_close_matches(name, known, 1)
            yield f"unknown setting {name}" + "".join(f"; did you mean {one}?" for one in close)


def is_local(listen: str) -> bool:
    """Tell whether only this machine can reach an address."""
    host = listen.rpartition(":")[0]
    if listen.startswith("unix:") or host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _knows_callers(info: ValidationInfo) -> bool:
    return bool(info.data.get("tls_client_ca_file") or info.data.get("jwt_keys_file"))


def _together(value: Path | None, info: ValidationInfo, *others: str) -> Path | None:
    if len({bool(value), *(bool(info.data.get(name)) for name in others)}) > 1:
        names = " and ".join(f"{PREFIX}{name.upper()}" for name in others)
        raise ValueError(f"goes with {names}; set all of them, or none")
    return value
