"""Settings: the only reader of the environment."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
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
ADDRESS = re.compile(r"unix:.+|.*:([0-9]{1,5})")
MAX_PORT = 65535
LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class SecretFiles(PydanticBaseSettingsSource):
    """`ROSTER_X_FILE` names a file whose content is `ROSTER_X`, as container platforms hand out secrets."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"{PREFIX}{field_name.upper()}"
        path = os.environ.get(f"{variable}_FILE")
        # A field that has aliases goes by the first of them in every source: otherwise none beats the other.
        key = variable if field.validation_alias else field_name
        return (Path(path).read_text().strip() if path else None), key, False

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields.items()
        values = [self.get_field_value(field, name) for name, field in fields]
        return {key: value for value, key, _ in values if value is not None}


class Settings(BaseSettings):
    """Every setting of the service; `ROSTER_` and the name in capitals is its environment variable."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,  # it can be a password
    )

    insecure: bool = Field(default=False, description="listen beyond this machine without TLS")
    listen: str = Field("127.0.0.1:50051", description="host:port, or unix:/path; port 0 takes a free one")
    reflection: bool = Field(default=True, description="let grpcurl and others ask for the contract")
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
    drain_pause: float = Field(
        0, ge=0, description="seconds between NOT_SERVING and refusing calls, for load balancers to notice"
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
    pool_recycle: Seconds = Field(1800, description="seconds after which a connection is replaced")
    pool_pre_ping: bool = Field(
        default=False, description="test each connection before its use; halves the speed"
    )
    connect_timeout: Seconds = Field(5, description="seconds to open a connection")
    database_wait: float = Field(30, ge=0, description="seconds the start waits for a database that is away")
    statement_timeout: Seconds = Field(30, description="seconds one statement may take")
    bulk_connections: Count = Field(4, description="connections for the bulk streams, apart from the pool")

    bulk_load_ttl: timedelta = Field(
        timedelta(days=7),
        description="how long outcomes are kept after a load's last batch, in seconds or ISO 8601",
    )

    workers: Count = Field(1, description="processes that share the port; more than one need PostgreSQL")
    password_workers: Count = Field(2, description="threads that hash passwords")
    password_queue: Count = Field(64, description="hashings in hand; more are refused as overload")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFiles(settings_cls), dotenv_settings, file_secret_settings

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

    @field_validator("metrics_listen", "health_listen")
    @classmethod
    def _is_address_or_none(cls, value: str) -> str:
        return value and cls._is_address(value)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        address = ADDRESS.fullmatch(value)
        # gRPC would take a larger port modulo 65536.
        if not address or int(address[1] or 0) > MAX_PORT:
            raise ValueError(f"must be host:port, with a port up to {MAX_PORT}, or unix:/path")
        return value

    @field_validator("listen")
    @classmethod
    def _loopback_unless_insecure(cls, value: str, info: ValidationInfo) -> str:
        if not info.data.get("insecure") and not value.startswith(LOOPBACK):
            raise ValueError(
                "without TLS the server listens on this machine only; use 127.0.0.1, [::1] or "
                "unix:/path, or set ROSTER_INSECURE=true if the network keeps strangers out"
            )
        return value

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
