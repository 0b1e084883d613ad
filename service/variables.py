"""Variables of the environment, and of the file `.env` in the current folder, for settings and commands."""

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from stat import S_IWOTH
from typing import Any

from dotenv import dotenv_values

PREFIX = "ROSTER_"
# Variables of the client commands, with the option that each is the default of; then those of `roster token`.
FOR_CLIENTS = {
    f"{PREFIX}ADDRESS": "address",
    f"{PREFIX}TLS_CA_FILE": "tls_ca",
    f"{PREFIX}TLS_SERVER_NAME": "tls_server_name",
    f"{PREFIX}TLS_CLIENT_CERT_FILE": "tls_cert",
    f"{PREFIX}TLS_CLIENT_KEY_FILE": "tls_key",
    f"{PREFIX}TOKEN_FILE": "token_file",
    f"{PREFIX}TOKEN": "token",
    f"{PREFIX}INSECURE_TOKEN": "insecure_token",
}
FOR_TOKENS = {f"{PREFIX}JWT_ISSUER": "issuer", f"{PREFIX}JWT_AUDIENCE": "audience"}


def environment() -> Mapping[str, str]:
    """Return the environment variables, for those of other programs: libpq's and OpenTelemetry's."""
    return os.environ


def folder_variables() -> dict[str, str]:
    """Return the variables in the file `.env` of the current folder, with their names in capitals.

    Nothing is expanded: `${ROSTER_TOKEN}` in an address would send the token to it. Raises OSError if another
    user can have written the file.
    """
    path = Path(".env")
    if not (path.is_file() or path.is_fifo()):
        return {}
    with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a byte order mark
        status = os.fstat(file.fileno())
        if status.st_uid not in (0, os.geteuid()):
            raise OSError(
                f"{Path.cwd()}/.env belongs to another user; change its owner, or use another folder"
            )
        if status.st_mode & S_IWOTH:
            raise OSError(f"other users can change {Path.cwd()}/.env; run: chmod go-w .env")
        try:
            variables = dotenv_values(stream=file, interpolate=False)
        except UnicodeDecodeError:
            raise OSError(f"{Path.cwd()}/.env is not UTF-8; save it as UTF-8") from None
    return {name.upper(): value for name, value in variables.items() if value is not None}


def clean(value: str) -> str:
    """Return a value without white space around it, and without the quotes of `docker run --env-file`."""
    value = value.strip()
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1].strip() if is_quoted else value


def folder_options(options: Mapping[str, str]) -> dict[str, Any]:
    """Return the defaults of command-line options in `.env`, given their variables; raises OSError."""
    variables = folder_variables()
    return {option: clean(variables[name]) for name, option in options.items() if variables.get(name)}


def is_local(listen: str) -> bool:
    """Return whether only this machine can reach an address."""
    host = listen.rpartition(":")[0]
    if listen.startswith("unix:") or host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
