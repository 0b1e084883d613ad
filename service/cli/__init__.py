"""The command `roster`."""

import os

# gRPC writes lines of its own, such as "Got goaway", to standard error. It reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import click

from service import __version__
from service.cli.export import export
from service.cli.load import load
from service.cli.loads import loads
from service.cli.migrate import migrate
from service.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="roster")
def main() -> None:
    """Roster: the system of record for users and their posts."""


for command in (serve, migrate, load, loads, export):
    main.add_command(command)
