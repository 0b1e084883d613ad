"""Settings for a person at a terminal: every one explained, everything wrong told at once."""

from pydantic import ValidationError
from pydantic_core import to_json

from service.cli.terminal import UsageError
from service.settings import PREFIX, Settings, is_password_redirected


def settings() -> Settings:
    """Return the settings of the environment; ends the command with status 2 where they are wrong."""
    try:
        chosen = Settings()
    except ValidationError as error:
        lines = [_line(problem["loc"], problem["msg"]) for problem in error.errors()]
        raise UsageError(*lines) from None
    except OSError as error:
        raise UsageError(str(error)) from None
    if is_password_redirected(chosen.database_url):
        raise UsageError(
            "PGPASSWORD of the environment would be sent to the database in the .env of this folder; set "
            "ROSTER_DATABASE_URL in the environment, or keep both in one place"
        )
    return chosen


def settings_help() -> str:
    """Return a table of all settings with their defaults, as `roster serve --help` shows it."""
    rows = [
        (f"{PREFIX}{name.upper()}", f"{field.description}  [{_shown(field.default)}]")
        for name, field in Settings.model_fields.items()
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        f"\b\nSettings, from the environment or a file .env:\n{table}\n\n\b\n"
        "DATABASE_URL stands in for ROSTER_DATABASE_URL. ROSTER_X_FILE names a file that has the value\n"
        "of ROSTER_X, as secrets are handed out."
    )


def _shown(default: object) -> str:
    told = to_json(default).decode().strip('"')
    return "unset" if told in ("", "null") else told


def _line(where: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not where:
        return message
    name = str(where[0])
    return f"{name if name.isupper() else PREFIX + name.upper()}: {message}"
