"""The rules of the names of bulk loads, and of naming the caller who has one."""

from service.auth.caller import Caller
from service.validation import collect_violations, text_error

MAX_LOAD_ID = 255
MAX_CALLER = 255
PRINTABLE = "must have printable characters only, and of white space only the space"


def check_load_id(load_id: str, field: str = "load_id") -> str:
    """Return the name of a load; raises InvalidField."""
    with collect_violations() as violations:
        violations.add(field, text_error(load_id, MAX_LOAD_ID) if load_id else "is required")
    return load_id


def check_new_load_id(load_id: str, field: str = "load_id") -> None:
    """Check the name of a new load; raises InvalidField.

    Loads with other names exist from before this rule. They can still be resumed, shown and aborted.
    """
    with collect_violations() as violations:
        # Excludes control, format, surrogate, private-use and unassigned characters, and line separators.
        violations.add(field, None if load_id.isprintable() else PRINTABLE)


def check_owner(owner: str, caller: Caller, field: str = "caller") -> str:
    """Return the owner of loads that a request of the caller names, "" if none.

    Raises PermissionDenied if the caller is not an admin, InvalidField.
    """
    if owner:
        caller.require("admin", field)
        with collect_violations() as violations:
            violations.add(field, text_error(owner, MAX_CALLER))
    return owner
