"""What an answer shows of entities: no more than its caller may read."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from service.auth.caller import current_caller
from service.validation import check_choice

MessageT = TypeVar("MessageT", bound=Message)

# What a write itself made, whichever fields it wrote.
WRITTEN = frozenset({"id", "version", "updated_at"})


@dataclass(frozen=True)
class View:
    """A view that shows another entity too; `needs` is the RPC that reads that entity alone."""

    choices: Any
    value: int
    needs: str

    def is_asked(self, view: int) -> bool:
        """Tell whether a request asks for this view.

        Raises InvalidField for an unknown view, PermissionDenied unless the caller may call `needs`.
        """
        check_choice(view, self.choices, "view")
        if view != self.value:
            return False
        current_caller().require_rpc(self.needs, f"the view {self.choices.Name(view)}")
        return True


def as_written(answer: MessageT, fields: Collection[str], reads: str) -> MessageT:
    """Return the answer of an update: whole for callers who may call `reads`, otherwise what they wrote.

    An update that changes nothing would show everything.
    """
    if reads in current_caller().rpcs:
        return answer
    for field, _ in answer.ListFields():
        if field.name not in WRITTEN and field.name not in fields:
            answer.ClearField(field.name)
    return answer
