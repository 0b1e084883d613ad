"""`roster completion`: what a shell needs to complete the command."""

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print the completion for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion for a SHELL: `eval "$(roster completion bash)"` in ~/.bashrc."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"there is no completion for {shell}")
    click.echo(kind(context.find_root().command, {}, "roster", "_ROSTER_COMPLETE").source())
