"""The command `roster`."""

import os
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import click

from service import __version__
from service.escape import escape
from service.logs import escape_failures
from service.memory import importing

# gRPC reads these when it is imported. Its core logs to standard error, and headers of callers can trigger
# some of its messages; its fork handlers can kill the worker processes that `serve` starts.
for name, value in {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}.items():
    os.environ[name] = os.environ.get(name) or value  # empty means unset
NARROW, NAME_WIDTH_IN_NARROW = 72, 10  # columns
# With their descriptions: importing a command takes up to half a second.
COMMANDS = {
    "serve": "Run the server until SIGTERM or SIGINT.",
    "migrate": "Migrate the database schema to this release.",
    "doctor": "Check that `roster serve` can run with these settings.",
    "load": "Load a file of users or posts.",
    "loads": "List, show, abort or undo bulk loads.",
    "users": "Get, list, create, update, deactivate or delete users.",
    "posts": "Get, list, create, update or delete posts.",
    "count": "Count users or posts.",
    "export": "Export users or posts to a file.",
    "changes": "Print changes of users and posts as they happen.",
    "token": "Create keys and bearer tokens for development.",
    "completion": "Print the completion script for a shell.",
}


class EnvFileError(click.ClickException):
    """The `.env` file of the current directory can't be used."""

    exit_code = 2


class FileError(click.ClickException):
    """A file that an option or argument names can't be used; the command itself is right, so no usage."""

    exit_code = 2


class ArgumentError(click.ClickException):
    """An argument can't be sent to the server."""

    exit_code = 2


class Formatter(click.HelpFormatter):
    """Writes descriptions below the names if the terminal is narrow: their words are whole then."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, col_max if self.width >= NARROW else NAME_WIDTH_IN_NARROW, col_spacing)


click.Context.formatter_class = Formatter


class LazyGroup(click.Group):
    """Imports only the command that runs, so that clients don't import the server."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # The first process of a container ignores SIGTERM unless it has a handler. Commands replace this one.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        escape_failures()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            # Click's own messages repeat arguments, such as file names.
            error.message = "\n".join(map(escape, error.message.split("\n")))  # type: ignore[misc]
            if _is_about_file(error):
                raise FileError(error.format_message()) from None
            raise
        except UnicodeEncodeError as error:  # where a text becomes a field of a request
            if error.encoding != "utf-8":
                raise
            raise ArgumentError(f"{_source_of(error.object)} is not UTF-8") from None
        except (KeyboardInterrupt, click.Abort) as error:  # where no command reports it; Click exits with 1
            if isinstance(error, click.Abort) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            click.echo("interrupted", err=True)
            sys.exit(128 + signal.SIGINT)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        with importing():
            command: click.Command = getattr(import_module(f"service.cli.{cmd_name}"), cmd_name)
        return command


def _source_of(text: str) -> str:
    """Return the argument or the variable of the environment that contains a text; values can be secrets."""
    if found := next((argument for argument in sys.argv if text in argument), ""):
        return f"the argument {escape(found)}"
    variables = (name for name, value in os.environ.items() if text in value)
    return next(variables, "an argument or a variable of the environment")


def _is_about_file(error: click.ClickException) -> bool:
    """Return whether a file was named, but can't be used."""
    if not isinstance(error, click.BadParameter) or isinstance(error, click.MissingParameter):
        return False
    return error.param is not None and isinstance(error.param.type, click.Path)


@click.command(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="roster")
@click.pass_context
def main(context: click.Context) -> None:
    """Roster: the system of record for users and their posts."""
    # Not needed for the list of commands, and slow to import.
    from service.variables import FOR_CLIENTS, FOR_TOKENS, folder_options  # noqa: PLC0415

    try:
        clients, tokens = folder_options(FOR_CLIENTS), folder_options(FOR_TOKENS)
    except OSError as error:
        raise EnvFileError(str(error)) from None
    # As defaults, not in the environment: click then reports where the value of an option comes from.
    nested = {"changes": {"watch": clients}, "token": {"issue": tokens}}
    context.default_map = {**dict.fromkeys(COMMANDS, clients), **nested}
