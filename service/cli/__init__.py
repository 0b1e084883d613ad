"""The command `roster`."""

import os
import signal
import sys
from importlib import import_module
from typing import Any

import click

from service import __version__
from service.settings import prepare_options

# gRPC writes lines of its own, such as "Got goaway", to standard error. It reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Its fork handlers can kill the children that `serve` starts for its workers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
COMMANDS = ["serve", "migrate", "doctor", "load", "loads", "export", "token", "completion"]


class Commands(click.Group):
    """Imports the command that is asked for: a client need not wait for the imports of the server."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # Until a command says otherwise. The first process of a container would not hear it at all.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"service.cli.{cmd_name}"), cmd_name)
        return command


@click.command(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="roster")
def main() -> None:
    """Roster: the system of record for users and their posts."""
    prepare_options()
