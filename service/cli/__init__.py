"""The command `roster`."""

import os
import signal
import sys
from importlib import import_module
from typing import Any

import click

from service import __version__
from service.escape import escape
from service.logs import escape_failures
from service.settings import FOR_CLIENTS, FOR_TOKENS, folder_options

# gRPC's core writes lines of its own to standard error; a caller's headers can cause some. It reads this when
# it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Its fork handlers can kill the children that `serve` starts for its workers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
COMMANDS = ["serve", "migrate", "doctor", "load", "loads", "export", "token", "completion"]


class FolderError(click.ClickException):
    """A file `.env` that can't be used."""

    exit_code = 2


class Commands(click.Group):
    """Imports the command that is asked for: a client need not wait for the imports of the server."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # Until a command says otherwise. The first process of a container would not hear it at all.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        escape_failures()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            # Messages of click's own repeat arguments, such as names of files.
            error.message = "\n".join(map(escape, error.message.split("\n")))  # type: ignore[misc]
            raise

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
@click.pass_context
def main(context: click.Context) -> None:
    """Roster: the system of record for users and their posts."""
    try:
        clients, tokens = folder_options(FOR_CLIENTS), folder_options(FOR_TOKENS)
    except OSError as error:
        raise FolderError(str(error)) from None
    # Not into the environment: an option knows then where its value is from.
    context.default_map = {**dict.fromkeys(COMMANDS, clients), "token": {"issue": tokens}}
