"""Limits what a response shows to what its caller may read."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from service.auth.caller import current_caller
from service.fields import check_choice

MessageT = TypeVar("MessageT", bound=Message)

# Fields that the server sets in every write.
WRITTEN = frozenset({"id", "version", "updated_at"})


@dataclass(frozen=True)
class View:
    """A view that includes another entity; `needs` is the RPC that reads that entity."""

    choices: Any
    value: int
    needs: str

    def is_asked(self, view: int) -> bool:
        """Return whether a request asks for this view.

        Raises InvalidField for an unknown view, PermissionDenied unless the caller may call `needs`.
        """
        check_choice(view, self.choices, "view")
        if view != self.value:
            return False
        current_caller().require_rpc(self.needs, f"the view {self.choices.Name(view)}")
        return True


def as_written(answer: MessageT, fields: Collection[str], reads: str) -> MessageT:
    """Return the response of an update: complete for callers who may call `reads`, otherwise what they wrote.

    Otherwise an update that changes nothing would show everything.
    """
    if reads in current_caller().rpcs:
        return answer
    for field, _ in answer.ListFields():
        if field.name not in WRITTEN and field.name not in fields:
            answer.ClearField(field.name)
    return answer
