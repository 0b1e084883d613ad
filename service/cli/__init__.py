"""The command `roster`."""

import click

from service import __version__
from service.cli.load import load
from service.cli.migrate import migrate
from service.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="roster")
def main() -> None:
    """Roster: the system of record for users and their posts."""


main.add_command(serve)
main.add_command(migrate)
main.add_command(load)
