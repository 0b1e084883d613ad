"""Settings at a terminal: their help, and all errors at once."""

from collections.abc import Iterator, Sequence

import click
from pydantic import ValidationError
from pydantic_core import to_json

from service.cli.terminal import UsageError
from service.settings import Settings, is_password_redirected
from service.variables import PREFIX

# The settings in `roster serve --help`; a test fails if one is missing.
GROUPS = {
    "Essential settings": ("database_url", "listen", "workers", "log_level", "log_format"),
    "Security": (
        "tls_cert_file",
        "tls_key_file",
        "tls_client_ca_file",
        "jwt_issuer",
        "jwt_audience",
        "jwt_keys_file",
        "policy_file",
        "insecure",
        "reflection",
    ),
    "Observability": ("metrics_listen", "health_listen", "slow_call"),
    "Start and stop": ("database_required", "database_wait", "drain_pause", "grace", "max_connection_age"),
    "Database": (
        "migration_url",
        "replica_url",
        "database_pooler",
        "pool_size",
        "max_overflow",
        "pool_timeout",
        "pool_recycle",
        "pool_pre_ping",
        "connect_timeout",
        "statement_timeout",
    ),
    "Bulk loads": ("bulk_connections", "bulk_load_ttl"),
    "Change feed": ("changes_ttl", "max_watchers"),
    "Passwords": (
        "password_memory",
        "password_passes",
        "password_lanes",
        "password_workers",
        "password_queue",
    ),
    "Limits": ("max_calls", "caller_calls", "caller_streams", "caller_rate", "stream_idle_timeout"),
}
OTHER = "Other"
# If a message begins with one of these, the setting is its subject.
VERBS = {"contains", "has", "is", "must", "names", "needs", "should"}
NOTE = (
    "Settings come from the environment or a file named .env. DATABASE_URL is used if ROSTER_DATABASE_URL is "
    "not set. ROSTER_X_FILE names a file that contains the value of ROSTER_X, for mounted secrets."
)


def read_settings() -> Settings:
    """Return the settings; raises UsageError, which lists every invalid one."""
    try:
        settings = Settings()
    except ValidationError as error:
        lines = [_error_line(problem["loc"], problem["msg"]) for problem in error.errors()]
        raise UsageError(*lines) from None
    except OSError as error:
        raise UsageError(str(error)) from None
    if is_password_redirected(settings):
        raise UsageError(
            "PGPASSWORD of the environment would be sent to the database in the .env of this directory; "
            "set ROSTER_DATABASE_URL in the environment, or set both in the same place"
        )
    return settings


class CommandWithSettings(click.Command):
    """A command whose help lists the settings of the server, in groups."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the groups as sections, like those of options."""
        for title, names in setting_groups():
            with formatter.section(title):
                formatter.write_dl([*map(_describe, names)])
        formatter.write_paragraph()
        formatter.write_text(NOTE)


def setting_groups() -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the title and the settings of each group; those without a group come last."""
    yield from GROUPS.items()
    rest = [*Settings.model_fields.keys() - {name for names in GROUPS.values() for name in names}]
    if rest:
        yield OTHER, rest


def _describe(name: str) -> tuple[str, str]:
    field = Settings.model_fields[name]
    return f"{PREFIX}{name.upper()}", f"{field.description}  [{_format_default(field.default)}]"


def _format_default(default: object) -> str:
    text = to_json(default).decode().strip('"')
    return "unset" if text in ("", "null") else text


def _error_line(location: tuple[int | str, ...], message: str) -> str:
    """Return one sentence about a setting; pydantic's own messages begin with `Input should be`."""
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    if not location:
        return message
    name = str(location[0])
    variable = name if name.isupper() else PREFIX + name.upper()
    joint = " " if message.partition(" ")[0] in VERBS else ": "
    return f"{variable}{joint}{message}"
