"""Audit log: one line for each write, with the caller, the target and the outcome; never the values.

A watch reveals all changes for days. It has a line when it begins and one when it ends.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from roster.consistency import READ_PREFIXES
from roster.errors import RosterError
from roster.v1.bulk_pb2 import BulkLoad, BulkWriteResponse
from service.auth.caller import current_caller
from service.interceptors.chain import Context, Proceed, Request, Response, Rpc
from service.loads.model import COUNTED
from service.services import RPCS

log = logging.getLogger("roster.audit")
# A logger's own level takes precedence over the root's, which ROSTER_LOG_LEVEL sets.
log.setLevel(logging.INFO)

# An RPC with any other verb counts as a write.
NOT_WRITES = (*READ_PREFIXES, "Verify", "Watch")


def _target_path(method: MethodDescriptor) -> str:
    """Return the field of a request that identifies the target; "" if only the response does."""
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


# RPC -> the field of its request that identifies the target, for all RPCs that write.
TARGETS = {
    path: _target_path(method) for path, method in RPCS.items() if not method.name.startswith(NOT_WRITES)
}


@dataclass
class Entry:
    """The fields of one line; the counts include only rows that this stream was the first to write.

    `owner` is the caller whose load the target is; an admin may write to the load of another caller. `effect`
    is what a CreateUser did: created, skipped or updated. A dry run has written nothing.
    """

    caller: str
    method: str
    target: int | str
    owner: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    outcome: str = "OK"
    effect: str = ""
    dry_run: bool = False

    def note(self, response: Response) -> None:
        """Add the target and the row counts of a response."""
        if isinstance(response, BulkLoad):
            self.owner = response.caller
        elif not isinstance(response, BulkWriteResponse):
            self.target = self.target or getattr(response, "id", "") or ""  # a dry run creates no id
        elif response.HasField("opened"):
            self.target, self.owner = response.opened.load_id, response.opened.caller
        elif response.HasField("ack") and not response.ack.replayed:
            self.counts = {name: self.counts.get(name, 0) + getattr(response.ack, name) for name in COUNTED}


# Of the current call, and of the tasks that it starts.
_entry: ContextVar[Entry | None] = ContextVar("entry", default=None)


def note_effect(effect: str, target: int) -> None:
    """Note what the current call did, and the id of the row; 0 if there is none.

    The call may be cancelled before its response is known.
    """
    if entry := _entry.get():
        entry.effect, entry.target = effect, target or ""


def note_dry_run() -> None:
    """Note that the current call writes nothing."""
    if entry := _entry.get():
        entry.dry_run = True


class NotingContext:
    """A stream's context that notes each response in an entry before it is written."""

    def __init__(self, context: Context, entry: Entry) -> None:
        self._context = context
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, response: Message) -> None:
        self._entry.note(response)
        await self._context.write(response)


def audit_writes(rpc: Rpc, proceed: Proceed) -> Proceed:
    """Log each write. This is the innermost interceptor, because it reads parsed requests."""
    if rpc.path not in TARGETS:
        return proceed
    target = attrgetter(TARGETS[rpc.path]) if TARGETS[rpc.path] else None

    async def audit(request: Request, context: Context) -> Response:
        entry = Entry(current_caller().identity, rpc.path, target(request) if target else "")
        entry.dry_run = getattr(request, "validate_only", False)
        _entry.set(entry)
        with _log_at_end(entry):
            if rpc.is_download:
                noting: Any = NotingContext(context, entry)
                return await proceed(request, noting)
            response = await proceed(request, context)
            entry.note(response)
            return response

    return audit


@contextmanager
def audit_watch(path: str, target: str, counts: dict[str, int]) -> Iterator[None]:
    """Log a watch when it begins and when it ends; the block changes the counts."""
    entry = Entry(current_caller().identity, path, target, counts=counts, outcome="BEGUN")
    log.info("watch", extra={"fields": asdict(entry)})
    entry.outcome = "OK"
    with _log_at_end(entry, "watch"):
        yield


@contextmanager
def _log_at_end(entry: Entry, event: str = "write") -> Iterator[None]:
    """Log the entry when the call ends, whether it succeeds or fails."""
    try:
        yield
    except RosterError as error:
        entry.outcome = error.reason
        raise
    except BaseException as error:
        entry.outcome = "INTERNAL" if isinstance(error, Exception) else "CANCELLED"
        raise
    finally:
        log.info(event, extra={"fields": asdict(entry)})
