"""`roster completion`: shell completion."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    For bash, add `eval "$(roster completion bash)"` to ~/.bashrc.
    """
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"completion is not available for {shell}")
    click.echo(script(context.find_root().command, {}, "roster", "_ROSTER_COMPLETE").source())
