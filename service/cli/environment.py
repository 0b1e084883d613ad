"""Settings at a terminal: their help, and all errors at once."""

from pydantic import ValidationError
from pydantic_core import to_json

from service.cli.terminal import UsageError
from service.settings import PREFIX, Settings, is_password_redirected


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


def settings_help() -> str:
    """Return a table of all settings with their defaults, for `roster serve --help`."""
    rows = [
        (f"{PREFIX}{name.upper()}", f"{field.description}  [{_format_default(field.default)}]")
        for name, field in Settings.model_fields.items()
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        f"\b\nSettings, from the environment or a file named .env:\n{table}\n\n\b\n"
        "DATABASE_URL is used if ROSTER_DATABASE_URL is not set. ROSTER_X_FILE names a file that contains\n"
        "the value of ROSTER_X, for mounted secrets."
    )


def _format_default(default: object) -> str:
    text = to_json(default).decode().strip('"')
    return "unset" if text in ("", "null") else text


def _error_line(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    name = str(location[0])
    variable = name if name.isupper() else PREFIX + name.upper()
    return f"{variable}: {message}"
