"""Errors of the client: they survive copies, and whatever a server puts into their details."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from roster.client import LoadInterrupted
from roster.client.errors import error_from_status, is_retryable
from roster.errors import (
    EmailTaken,
    InvalidField,
    PermissionDenied,
    RosterError,
    Unauthenticated,
    Unsupported,
    VersionMismatch,
    Violation,
)

ERRORS = [
    EmailTaken("taken", field="email", existing_id=4),
    InvalidField.of([Violation("email", "is wrong"), Violation("id", "is wrong")]),
    LoadInterrupted(VersionMismatch.of(3), acknowledged=7),
    Unauthenticated.because("expired"),
    VersionMismatch.of(3),
]


def subclasses(kind: type[RosterError]) -> list[type[RosterError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in subclasses(below))]


def pickled(error: RosterError) -> Any:
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_are_equal(copied: Callable[[RosterError], RosterError]) -> None:
    """Between processes, errors are pickled."""
    plain = [kind("it failed") for kind in subclasses(RosterError) if kind is not LoadInterrupted]
    for error in [*ERRORS, *plain]:
        other = copied(error)
        assert type(other) is type(error)
        assert str(other) == str(error)
        for name in ("reason", "message", "field", "facts", "violations", "retry_after_seconds"):
            assert getattr(other, name) == getattr(error, name)


@pytest.mark.parametrize("reason", ["USER_NOT_FOUND", "REASON_OF_A_LATER_RELEASE"])
def test_facts_have_any_name(reason: str) -> None:
    """Those that are numbers, as the server writes them, are numbers."""
    texts = {"field": "a", "message": "b", "self": "c", "cls": "0012", "digits": "9" * 5000, "id": "12"}
    packed = AnyMessage()
    packed.Pack(ErrorInfo(reason=reason, metadata=texts))
    status = Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="nobody", details=[packed])

    error = error_from_status(status)

    assert (error.reason, error.message, error.field) == (reason, "nobody", "")
    assert error.facts == {**texts, "id": 12}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.UNIMPLEMENTED, Unsupported),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, RosterError),
    ],
)
def test_errors_of_proxies_have_the_class_of_their_status(
    code: grpc.StatusCode, kind: type[RosterError]
) -> None:
    """They have no reason; a message that is too large must not look like a rate limit, which is retried."""
    error = error_from_status(Status(code=code.value[0], message="no"))

    assert isinstance(error, kind)
    assert not is_retryable(error)
