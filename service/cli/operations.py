"""The operations of `roster load`, and the options that they have."""

from collections.abc import Mapping, Sequence

import click
from click.core import ParameterSource

# Without one of these flags, a load creates rows.
FLAGS = ("update", "restore", "delete", "mirror")
# Options that only one operation has.
OWN: Mapping[str, Sequence[str]] = {
    "delete": ("on_missing", "restrict"),
    "mirror": ("key", "filter_", "deactivate", "max_deletes", "dry_run"),
}
# Options that an operation does not have, with the reason.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "delete": {
        "update_mask": "a delete writes no columns",
        "on_conflict": "the rows of a delete exist; --on-missing is for those that do not",
    },
    "mirror": {
        "load_id": "each run makes a new plan; run the same command again to resume",
        "caller": "each run makes a new plan",
        "update_mask": "a mirror writes the columns that the file has",
        "on_conflict": "a mirror updates the users that differ",
        "atomicity": "a mirror writes each row for itself, and reports those that fail",
        "validate_only": "use --dry-run",
        "max_failures": "--max-deletes is the limit of a mirror",
    },
}


def operation_of(entity: str) -> str:
    """Return the operation of the current command; raises UsageError if its options don't belong together."""
    context = click.get_current_context()
    flags = [name for name in FLAGS if context.params[name]]
    if len(flags) > 1:
        raise click.UsageError(f"--{flags[0]} and --{flags[1]} are two operations; use one of them")
    operation = flags[0] if flags else "create"
    _refuse_options(context, operation)
    if entity == "posts" and (operation == "mirror" or context.params["restrict"]):
        raise click.UsageError(f"--{'mirror' if operation == 'mirror' else 'restrict'} is for users")
    return operation


def _refuse_options(context: click.Context, operation: str) -> None:
    others = {name: owner for owner, names in OWN.items() if owner != operation for name in names}
    reasons = REFUSED.get(operation, {})
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if name in others:
            hint = "; use --validate-only" if name == "dry_run" else ""
            raise click.UsageError(f"{parameter.opts[0]} is for --{others[name]}{hint}")
        if name in reasons:
            raise click.UsageError(f"{parameter.opts[0]} is not for --{operation}: {reasons[name]}")
