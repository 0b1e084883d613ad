"""Views: the parts of a resource in an answer, limited to those that its caller may read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from service.auth.caller import current_caller
from service.db.selection import Selection
from service.encoding import RowEncoder
from service.timeslice import add_in_slices
from service.validation import check_choice
from service.wire import Fields

MessageT = TypeVar("MessageT", bound=Message)

# The fields that every write sets.
SET_BY_WRITES = frozenset({"id", "version", "updated_at"})


@dataclass(frozen=True)
class View:
    """One view of a resource: the selection that reads it, and the conversion to message fields.

    If a view has only the columns of the resource, `encoder` writes its rows without building messages.
    If it shows another resource, the caller must be allowed to call the RPC `needs`, which reads that.
    """

    selection: Selection
    to_fields: Callable[[Any], Fields]
    encoder: RowEncoder | None = None
    needs: str = ""

    async def response(self, rows: Sequence[Any], rest: Message, messages: Any) -> Message | bytes:
        """Return the response `rest` with these rows added; `messages` is its repeated field for them."""
        if self.encoder:
            return self.encoder.response(rows, rest)
        await add_in_slices(messages, self.to_fields, rows)
        return rest


@dataclass(frozen=True)
class Views:
    """The views of a resource, by their numbers in the contract."""

    enum: Any
    by_number: Mapping[int, View]

    def get(self, number: int) -> View:
        """Return the view that a request asks for.

        Raises InvalidField for an unknown view, PermissionDenied if the caller may not call the RPC it needs.
        """
        if number not in self.by_number:
            check_choice(number, self.enum, "view")
        view = self.by_number[number]
        if view.needs:
            current_caller().require_rpc(view.needs, f"the view {self.enum.Name(number)}")
        return view


def limit_to_written(answer: MessageT, fields: Collection[str], reads: str) -> MessageT:
    """Return the answer of an update, without the fields that the caller may not read.

    A caller who may not call the RPC `reads` sees only the fields that the update wrote. Otherwise an update
    that changes nothing would reveal the whole resource.
    """
    if reads in current_caller().rpcs:
        return answer
    for field, _ in answer.ListFields():
        if field.name not in SET_BY_WRITES and field.name not in fields:
            answer.ClearField(field.name)
    return answer
