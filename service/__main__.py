"""`python -m service` is the command `roster`."""

from service.cli import main

main(prog_name="roster")
