"""Audit log: one line for each write, with the caller, the target and the outcome; never the values."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

from google.protobuf.descriptor import MethodDescriptor

from roster.v1.bulk_pb2 import BulkLoad, BulkWriteResponse
from service.auth.caller import current_caller
from service.errors import RosterError
from service.interceptors.chain import Context, Proceed, Rpc
from service.loads.model import COUNTED
from service.services import RPCS

log = logging.getLogger("roster.audit")
# A logger's own level takes precedence over the root's, which ROSTER_LOG_LEVEL sets.
log.setLevel(logging.INFO)

# An RPC with any other verb counts as a write.
READ_PREFIXES = ("Get", "BatchGet", "List", "Export", "Verify")


def _target_path(method: MethodDescriptor) -> str:
    """Return where in its request a write names its target: "" if only the response has it."""
    request = method.input_type
    if method.client_streaming or method.name.startswith("Create"):
        return ""
    for name in ("id", "load_id"):
        if name in request.fields_by_name:
            return name
    for resource in request.fields:
        if resource.message_type and "id" in resource.message_type.fields_by_name:
            return f"{resource.name}.id"
    return ""


# The writes, each with the path of its target in the request.
TARGETS = {
    path: _target_path(method) for path, method in RPCS.items() if not method.name.startswith(READ_PREFIXES)
}


@dataclass
class Entry:
    """The fields of one line; the counts are of rows that this stream was the first to write.

    `owner` is the caller whose load the target is; an admin may write to the load of another caller.
    """

    caller: str
    method: str
    target: int | str
    owner: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    outcome: str = "OK"

    def note(self, response: Any) -> None:
        """Add what a response says of the target or the rows."""
        if isinstance(response, BulkLoad):
            self.owner = response.caller
        elif not isinstance(response, BulkWriteResponse):
            self.target = self.target or getattr(response, "id", "")
        elif response.HasField("opened"):
            self.target, self.owner = response.opened.load_id, response.opened.caller
        elif response.HasField("ack") and not response.ack.replayed:
            self.counts = {name: self.counts.get(name, 0) + getattr(response.ack, name) for name in COUNTED}


class NotingContext:
    """A stream's context whose responses are noted in an entry before they are written."""

    def __init__(self, context: Context, entry: Entry) -> None:
        self._context = context
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, response: Any) -> None:
        self._entry.note(response)
        await self._context.write(response)


def audit_writes(rpc: Rpc, proceed: Proceed) -> Proceed:
    """Log the writes of callers who may write; the innermost interceptor, since it reads parsed requests."""
    if rpc.path not in TARGETS:
        return proceed
    target = attrgetter(TARGETS[rpc.path]) if TARGETS[rpc.path] else None

    async def audit(request: Any, context: Context) -> Any:
        entry = Entry(current_caller().identity, rpc.path, target(request) if target else "")
        with _logged(entry):
            if rpc.is_download:
                noting: Any = NotingContext(context, entry)
                return await proceed(request, noting)
            response = await proceed(request, context)
            entry.note(response)
            return response

    return audit


@contextmanager
def _logged(entry: Entry) -> Iterator[None]:
    """Write the line of an entry when the call ends, in whatever way."""
    try:
        yield
    except RosterError as error:
        entry.outcome = error.reason
        raise
    except BaseException as error:
        entry.outcome = "INTERNAL" if isinstance(error, Exception) else "CANCELLED"
        raise
    finally:
        fields = asdict(entry)
        line = "%(method)s of %(target)r by %(caller)r: %(outcome)s %(counts)s"
        log.info(line, fields, extra={"fields": fields})
