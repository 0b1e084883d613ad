"""Commands import no package that they do not need: it would delay their start and take memory."""

import subprocess
import sys

import pytest

# With a server's own 0.85 s and 86 MiB: what is needed for migrations, for TLS and tokens, and by clients.
NOT_IN_SERVERS = {"alembic", "mako", "pygments", "rich", "cryptography", "jwt", "opentelemetry", "pyarrow"}
NOT_IN_CLIENTS = {"sqlalchemy", "aiosqlite", "asyncpg", "alembic", "pydantic", "uvloop", "cryptography"}
NOT_IN_HELP = NOT_IN_SERVERS | {"grpc", "google", "sqlalchemy", "asyncpg", "pydantic", "roster", "uvloop"}


def imported(program: str) -> set[str]:
    """Return the packages that a program imports."""
    code = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("program", "unneeded"),
    [
        ("from service.cli import main\nmain(['--help'], standalone_mode=False)", NOT_IN_HELP),
        ("import service.cli.serve\nfrom service.db import revisions\nrevisions.head()", NOT_IN_SERVERS),
    ],
    ids=["help", "serve"],
)
def test_imports_only_what_it_needs(program: str, unneeded: set[str]) -> None:
    """The others are imported where they are needed."""
    found = imported(program)

    assert "click" in found
    assert found & unneeded == set()


def test_database_needs_no_grpc() -> None:
    """Only servicers, interceptors and the bulk streams know gRPC."""
    found = imported("import service.db.engine, service.db.migrations")

    assert "sqlalchemy" in found
    assert "grpc" not in found


@pytest.mark.parametrize("command", ["changes watch", "count", "export", "load", "loads"])
def test_client_commands_need_no_server(command: str) -> None:
    """They start in a quarter of a second; SQLAlchemy and pydantic alone take longer."""
    words = [*command.split(), "--help"]
    found = imported(f"from service.cli import main\nmain({words}, standalone_mode=False)")

    assert "grpc" in found
    assert found & NOT_IN_CLIENTS == set()
